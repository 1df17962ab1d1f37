# SPDX-License-Identifier: Apache-2.0
"""The routed step against a dense reference that runs all sizes on all images.

The reference masks what was not chosen; plain SGD at rate 1 makes the change of
the parameters the gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import compilations, random_batch, tiny_model

from drnet_jax import losses, routing, settings
from drnet_jax import mesh as mesh_lib
from drnet_jax.bench import checks
from drnet_jax.errors import UserError
from drnet_jax.models import resolution_norm
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.routed import RoutedStep
from drnet_jax.steps.routed_objective import RoutedObjective

ETA, TARGET_SHARE, TAU = 0.7, 0.3, 0.8
KEY = jax.random.key(11)
SGD = optax.sgd(1.0)


def make_objective(model, **changes):
  gmacs = model.macs().gmacs
  objective = {
    'label_smoothing': 0.0,
    'gradient': 'chosen',
    'explore': 1.0,
    'loss': 'mixture',
    'statistics': 'batch',
    'tau': (TAU, TAU),
    'tau_epochs': 0,
    'eta': ETA,
    'eta_warmup_epochs': 0,
    'target_gmacs': TARGET_SHARE * gmacs[-1],
    'target_epochs': 0,
    'usage_weight': 0.0,
    'bucket_growth': 1.5,
    'costs': (),
  }
  return settings.call(RoutedObjective, objective | changes, 'objective')


def make_step(model, mesh, batch_size, optimizer=SGD, **changes):
  return RoutedStep(
    model,
    optimizer,
    mesh,
    make_objective(model, **changes),
    batch_size=batch_size,
    steps_per_epoch=10,
  )


def test_the_hinge_may_count_milliseconds():
  mesh = mesh_lib.create(1)
  model = tiny_model(resolutions=(16, 32))
  costs, target = (5.0, 9.0), 1.0
  step = make_step(model, mesh, 16, costs=costs, target_gmacs=target)
  batch = mesh_lib.shard_batch(random_batch(16), mesh)
  _, metrics = step(make_state(model, mesh), batch, KEY)
  shares = [float(metrics[f'share_r{r}']) for r in model.resolutions]
  # (mean cost - alpha) / (C_max - C_min)
  expected = (np.dot(shares, costs) - target) / (9 - 5)
  assert float(metrics['hinge']) == pytest.approx(expected, rel=1e-5)
  # As everywhere but in the hinge, the predictor is counted.
  macs = model.macs()
  gmacs = np.dot(shares, macs.gmacs) + macs.predictor / 1e9
  assert float(metrics['gmacs']) == pytest.approx(gmacs, rel=1e-5)
  with pytest.raises(UserError, match='is not one cost for each of'):
    make_step(model, mesh, 16, costs=(1.0, 2.0, 3.0))


@functools.cache
def _fresh(model):
  return jax.device_get(jax.jit(model.init)(jax.random.key(5)))


def make_state(model, mesh, *, never=None, rarely=None):
  params, stats = jax.tree.map(jnp.array, _fresh(model))  # dicts of its own
  head = params['predictor']['head']
  for index, bias in ((never, -1e6), (rarely, -1.0)):
    if index is not None:
      head['bias'] = head['bias'].at[index].set(bias)
  state = state_lib.begin(SGD, params, stats)
  return jax.device_put(state, mesh_lib.replicated(mesh))


def sharded(batch, mesh):
  return jax.device_put(batch, mesh_lib.by_batch(mesh))


def dense_step(model, state, batch, **changes):
  objective = make_objective(model, **changes)
  return checks.dense_step(model, state, batch, objective, KEY)


def assert_trees_close(ours, theirs, tolerance=1e-5):
  flat, _ = jax.tree_util.tree_flatten_with_path(ours)
  reference = jax.tree.leaves(theirs)
  for (path, a), b in zip(flat, reference, strict=True):
    np.testing.assert_allclose(
      a, b, atol=tolerance, rtol=tolerance, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize('devices, never', [(1, None), (4, 1), (8, None)])
def test_dispatch_equals_dense(devices, never):
  model, mesh = tiny_model(), mesh_lib.create(devices)
  batch, state = random_batch(24), make_state(model, mesh, never=never)
  params, stats, choice = dense_step(
    model,
    make_state(model, mesh_lib.create(1), never=never),
    batch,
    gradient='chosen',
    loss='mixture',
  )
  counts = np.bincount(choice, minlength=3)
  per_device = [
    np.bincount(part, minlength=3) for part in np.split(choice, devices)
  ]
  assert (counts[1] == 0) == (never == 1) and counts[0] and counts[2]
  if devices == 8:
    assert any(not c[0] for c in per_device), 'a device without takers of r16'

  step = make_step(model, mesh, 24)
  new, metrics = step(state, sharded(batch, mesh), KEY)
  assert_trees_close(new.params, params)
  assert_trees_close(new.batch_stats, stats)
  np.testing.assert_allclose(metrics['share_r32'], counts[2] / 24, rtol=1e-6)


@pytest.mark.parametrize(
  'loss, aware',
  [
    ('mixture', False),
    ('expected', True),
    pytest.param('mixture', True, marks=pytest.mark.slow),
    pytest.param('expected', False, marks=pytest.mark.slow),
  ],
)
def test_exploring_equals_dense(loss, aware):
  model, mesh = tiny_model(resolution_aware_bn=aware), mesh_lib.create(4)
  batch, state = random_batch(24, seed=1), make_state(model, mesh)
  params, stats, _ = dense_step(
    model,
    make_state(model, mesh_lib.create(1)),
    batch,
    gradient='all',
    loss=loss,
  )
  step = make_step(model, mesh, 24, gradient='all', loss=loss)
  new, _ = step(state, sharded(batch, mesh), KEY)
  assert_trees_close(new.params, params)
  assert_trees_close(new.batch_stats, stats)


def test_sizes_of_few_takers_get_fresh_statistics():
  who = {'never': 1, 'rarely': 0}
  how = {'gradient': 'all', 'loss': 'expected'}
  model, mesh = tiny_model(), mesh_lib.create(4)
  batch = random_batch(64, seed=4)
  state = make_state(model, mesh_lib.create(1), **who)
  params, stats, choice = dense_step(model, state, batch, **how)
  counts = np.bincount(choice, minlength=3)
  assert counts[1] == 0 < counts[0] < 64 / 8 <= counts[2]
  for size_px in model.resolutions[:2]:
    name = model.norm_set(size_px)
    _, stats['norm'][name] = model.classify(
      state.params['base'],
      state.params['norm'][name],
      state.batch_stats['norm'][name],
      batch['image'][::8],
      size_px,
      train=True,
    )
  step = make_step(model, mesh, 64, statistics='fresh', **how)
  state = make_state(model, mesh, **who)
  new, _ = step(state, sharded(batch, mesh), KEY)
  assert_trees_close(new.params, params)
  assert_trees_close(new.batch_stats, stats)


def test_one_set_for_all_sizes_is_never_stale():
  model = tiny_model(resolution_aware_bn=False)
  with pytest.raises(UserError, match='resolution_aware_bn'):
    make_step(model, mesh_lib.create(1), 8, statistics='fresh')


def test_statistics_may_stay_as_they_are():
  model, mesh = tiny_model(resolutions=(16, 32)), mesh_lib.create(4)
  batch, state = random_batch(24, seed=3), make_state(model, mesh)
  how = {'gradient': 'chosen', 'loss': 'mixture', 'statistics': 'running'}
  params, _, _ = dense_step(
    model, make_state(model, mesh_lib.create(1)), batch, **how
  )
  before = jax.tree.map(np.asarray, state.batch_stats['norm'])
  new, _ = make_step(model, mesh, 24, **how)(state, sharded(batch, mesh), KEY)
  assert_trees_close(new.params, params)
  assert_trees_close(new.batch_stats['norm'], before, tolerance=0)


def test_the_call_is_what_training_and_inference_compute():
  """`DRNet.__call__`, dense and short, against the step and `logits_at`."""
  model, mesh = tiny_model(resolutions=(16, 32)), mesh_lib.create(4)
  batch, state = random_batch(24), make_state(model, mesh_lib.create(1))
  stats = state.batch_stats
  gmacs = jnp.asarray(model.macs().gmacs)
  key = jax.random.fold_in(KEY, 0)  # of step 0

  def loss(params):
    logits, h = model(params, stats, batch['image'], key, tau=TAU)
    task = losses.cross_entropy(logits, batch['label'], label_smoothing=0.0)
    target = TARGET_SHARE * gmacs[-1]
    hinge = losses.flops_hinge(h, gmacs, target_gmacs=target)
    return task.mean() + ETA * hinge

  grads = jax.jit(jax.grad(loss))(state.params)
  step = make_step(model, mesh, 24, gradient='all', statistics='running')
  new, _ = step(make_state(model, mesh), sharded(batch, mesh), KEY)
  expected = jax.tree.map(jnp.subtract, state.params, grads)
  assert_trees_close(new.params, expected)

  logits, h = jax.jit(model)(state.params, stats, batch['image'])
  log_p, _ = model.predict(
    state.params['predictor'], stats['predictor'], batch['image'], train=False
  )
  every = model.all_logits(state.params, stats, batch['image'])
  choice = np.asarray(routing.choose(log_p))
  np.testing.assert_array_equal(h.argmax(-1), choice)
  np.testing.assert_allclose(logits, every[np.arange(24), choice], atol=1e-5)


def test_fresh_statistics_of_a_network_with_dropout():
  network = {
    'network': 'mobilenet_v2',
    'stem': 8,
    'stages': ((1, 8, 1, 1),),
    'head': 8,
  }
  model = tiny_model(base=network, resolutions=(16, 32))
  mesh = mesh_lib.create(2)
  step = make_step(model, mesh, 16, statistics='fresh', bucket_growth=8.0)
  batch = sharded(random_batch(16), mesh)
  before = make_state(model, mesh, never=1).batch_stats['norm']
  first, second = (
    step(make_state(model, mesh, never=1), batch, KEY)[0] for _ in range(2)
  )
  assert_trees_close(first.batch_stats, second.batch_stats, tolerance=0)
  for name, old in before.items():
    for a, b in zip(
      jax.tree.leaves(old),
      jax.tree.leaves(first.batch_stats['norm'][name]),
      strict=True,
    ):
      assert jnp.isfinite(b).all() and not jnp.array_equal(a, b)


def test_norms_that_no_image_chose_do_not_move():
  optimizer = optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
  )
  model, mesh = tiny_model(resolutions=(16, 32)), mesh_lib.create(4)
  batch, fresh = random_batch(24), make_state(model, mesh)
  state = fresh.replace(
    opt_state=jax.device_put(
      optimizer.init(fresh.params), mesh_lib.replicated(mesh)
    )
  )
  step = make_step(model, mesh, 24, optimizer)
  state, metrics = step(state, sharded(batch, mesh), KEY)
  assert all(metrics[f'share_r{r}'] for r in model.resolutions)
  head = state.params['predictor']['head']
  head['bias'] = head['bias'].at[1].set(-1e6)
  before = jax.device_get(state)
  state, metrics = step(state, sharded(batch, mesh), KEY)
  assert not metrics['share_r32']
  after = jax.device_get(state)
  for tree in (lambda s: s.params, lambda s: s.opt_state[1][0].trace):
    for name in ('r16', 'r32'):
      old, new = (
        jax.tree.leaves(tree(s)['norm'][name]) for s in (before, after)
      )
      stays = [np.array_equal(a, b) for a, b in zip(old, new, strict=True)]
      assert stays == [name == 'r32'] * len(old)


def test_each_image_weighs_the_same_in_running_statistics():
  """Up to an even share of the batch, which moves them as momentum says."""
  old, new = {'mean': jnp.zeros(3)}, {'mean': jnp.full(3, 0.1)}
  for takers, expected in ((1, 0.0125), (2, 0.025), (8, 0.1), (24, 0.1)):
    found = resolution_norm.weighed(old, new, jnp.asarray(takers), 8.0)['mean']
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_exploring_a_share_is_dense_on_those_images():
  """Half of a device's images teach the router as those images alone would."""
  model, mesh = tiny_model(resolutions=(16, 32)), mesh_lib.create(1)
  batch = random_batch(16, seed=2)
  every_other = {k: jnp.repeat(v[::2], 2, 0) for k, v in batch.items()}

  # eta 0: nothing else reaches the router.
  def router_after(data, share):
    step = make_step(
      model, mesh, 16, gradient='all', loss='expected', explore=share, eta=0.0
    )
    new, _ = step(make_state(model, mesh), sharded(data, mesh), KEY)
    return new.params['predictor']

  doubled = router_after(every_other, 1.0)
  assert_trees_close(router_after(every_other, 0.5), doubled)


def test_no_compilation_after_compile():
  model, mesh = tiny_model(resolutions=(16, 32)), mesh_lib.create(4)
  state = make_state(model, mesh)
  step = make_step(
    model, mesh, 48, gradient='all', statistics='fresh', bucket_growth=1.3
  )
  batch = sharded(random_batch(48), mesh)
  step.compile(state, batch)
  state, metrics = step(state, batch, KEY)  # route, explore, update
  jax.block_until_ready(metrics)

  shares = []
  with compilations() as compiled:
    for seed in range(6):
      # A head pushed about makes the shares, and the buckets, differ.
      state = state.replace(params=_tilted(state.params, seed, mesh))
      compiled.clear()
      state, metrics = step(
        state, sharded(random_batch(48, seed=seed), mesh), KEY
      )
      shares.append(float(metrics['share_r16']))
      assert not compiled
  assert max(shares) - min(shares) > 0.3


def _tilted(params, seed, mesh):
  head = params['predictor']['head']
  bias = jnp.zeros(2).at[0].set(seed - 3.0)
  tilted = params['predictor'] | {'head': head | {'bias': bias}}
  return jax.device_put(
    params | {'predictor': tilted}, mesh_lib.replicated(mesh)
  )


@pytest.mark.parametrize(
  'change, message',
  [
    ({'gradient': 'both'}, "gradient = 'both'"),
    ({'loss': 'hinge'}, "loss = 'hinge'"),
    ({'statistics': 'none'}, "statistics = 'none'"),
    ({'gradient': 'all', 'explore': 0.0}, 'explore = 0.0'),
    ({'gradient': 'all', 'explore': 0.001}, 'rounds to zero images'),
    ({'bucket_growth': 1.0}, 'bucket_growth'),
  ],
)
def test_values_that_cannot_work(change, message):
  with pytest.raises(UserError, match=message):
    make_step(tiny_model(), mesh_lib.create(1), 8, **change)


def test_sizes_of_one_cost_leave_no_choice():
  model = tiny_model(resolutions=(31, 32))
  assert len(set(model.macs().gmacs)) == 1
  with pytest.raises(UserError, match='all take the same multiply-adds'):
    make_objective(model).check_model(model)


def test_one_size_leaves_no_choice():
  with pytest.raises(UserError, match='at least two sizes'):
    make_step(tiny_model(resolutions=(32,)), mesh_lib.create(1), 8)
