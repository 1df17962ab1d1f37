# SPDX-License-Identifier: Apache-2.0
"""Parameters cut up over devices: less on each, and the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_batch, tiny_model
from test_routed import KEY, assert_trees_close, make_step

from drnet_jax import mesh as mesh_lib
from drnet_jax.errors import UserError
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.pretrain import PretrainObjective, PretrainStep
from drnet_jax.steps.routed import RoutedStep

OPTIMIZER = optax.sgd(0.5, momentum=0.9)


def trained(step_class, parameter_shards):
  """The state after two steps on four devices."""
  model = tiny_model(resolutions=(16, 32))
  mesh = mesh_lib.create(4, parameter_shards=parameter_shards)
  if step_class is RoutedStep:
    step = make_step(model, mesh, 16, OPTIMIZER, bucket_growth=8.0)
  else:
    step = PretrainStep(
      model,
      OPTIMIZER,
      mesh,
      PretrainObjective(label_smoothing=0.0, distill=0.0, teacher='largest'),
      batch_size=16,
      steps_per_epoch=1,
    )
  abstract = state_lib.abstract(model, OPTIMIZER)
  state = jax.jit(
    lambda key: state_lib.begin(OPTIMIZER, *model.init(key)),
    out_shardings=mesh_lib.shardings(abstract, mesh),
  )(jax.random.key(5))
  batch = mesh_lib.shard_batch(jax.tree.map(np.asarray, random_batch(16)), mesh)
  step.compile(state, batch)
  for _ in range(2):
    state, _ = step(state, batch, KEY)
  return state


def bytes_on_one_device(tree):
  return sum(
    x.addressable_shards[0].data.nbytes
    for x in jax.tree.leaves(tree)
    if x.ndim > 1
  )


@pytest.mark.parametrize('step_class', [PretrainStep, RoutedStep])
def test_cut_up_equals_whole(step_class):
  whole, quarters = trained(step_class, 1), trained(step_class, 4)
  assert_trees_close(quarters.params, jax.device_get(whole.params))
  assert_trees_close(quarters.batch_stats, jax.device_get(whole.batch_stats))
  for name in ('params', 'opt_state'):
    # Every kernel of this network has an axis that four divides.
    assert 4 * bytes_on_one_device(getattr(quarters, name)) == (
      bytes_on_one_device(getattr(whole, name))
    )


def test_what_cannot_be_cut_stays_whole():
  mesh = mesh_lib.create(parameter_shards=0)
  shapes = {
    'kernel': jnp.zeros((3, 3, 16, 64)),
    'odd': jnp.zeros((3, 5)),
    'bias': jnp.zeros(64),
  }
  specs = {
    k: tuple(s.spec) for k, s in mesh_lib.shardings(shapes, mesh).items()
  }
  assert specs == {
    'kernel': (None, None, None, 'shard'),
    'odd': (),
    'bias': (),
  }
  with pytest.raises(UserError, match='parameter_shards = 3 does not divide 8'):
    mesh_lib.create(parameter_shards=3)


@pytest.mark.parametrize('accumulate', [1, 3])
def test_running_average_of_the_weights(accumulate):
  """It counts updates, and not the steps that share one."""
  state = state_lib.begin(optax.sgd(1.0), {'w': jnp.zeros(1)}, {})
  average = state_lib.weights(state)
  expected = 0.0
  for step, value in enumerate([1.0, 2.0, 4.0], 1):
    state = state.replace(params={'w': jnp.full(1, value)})
    for i in range(accumulate):
      state = state.replace(step=jnp.asarray((step - 1) * accumulate + i + 1))
      average = state_lib.average(
        average, state, decay=0.3, accumulate=accumulate
      )
    decay = min(0.3, (1 + step) / (10 + step))  # 2/11, 1/4, then .3
    expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(average[0]['w'], [expected], rtol=1e-6)
