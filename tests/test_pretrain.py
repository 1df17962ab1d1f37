# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_batch, tiny_model
from test_routed import assert_trees_close, make_state, sharded

from drnet_jax import losses
from drnet_jax import mesh as mesh_lib
from drnet_jax.steps.pretrain import PretrainObjective, PretrainStep


def take_step(model, devices, batch, distill=0.0, teacher='largest'):
  mesh = mesh_lib.create(devices)
  step = PretrainStep(
    model,
    optax.sgd(1.0),
    mesh,
    PretrainObjective(label_smoothing=0.1, distill=distill, teacher=teacher),
    batch_size=len(batch['label']),
    steps_per_epoch=1,
  )
  return step(make_state(model, mesh), sharded(batch, mesh), jax.random.key(0))


@pytest.mark.parametrize('distill', [0.0, 0.3])
def test_gradient_is_that_of_the_summed_losses(distill):
  model, batch = tiny_model(), random_batch(16)
  state = make_state(model, mesh_lib.create(1))

  def total(params):
    value, teacher = 0.0, None
    for r in sorted(model.resolutions, reverse=True):
      name = model.norm_set(r)
      logits, _ = model.classify(
        params['base'],
        params['norm'][name],
        state.batch_stats['norm'][name],
        batch['image'],
        r,
        train=True,
      )
      value += losses.cross_entropy(
        logits, batch['label'], label_smoothing=0.1
      ).mean() * (1 if teacher is None else 1 - distill)
      if teacher is None:
        teacher = jax.nn.softmax(jax.lax.stop_gradient(logits))
      else:
        like_teacher = losses.cross_entropy(
          logits, teacher, label_smoothing=0.1
        )
        value += distill * like_teacher.mean()
    return value

  value, grads = jax.jit(jax.value_and_grad(total))(state.params)
  new, metrics = take_step(model, 8, batch, distill)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  expected = jax.tree.map(jnp.subtract, state.params, grads)
  assert_trees_close(new.params, expected)


@pytest.mark.parametrize(
  'kind, teacher',
  [
    ('plain', 'ensemble'),
    ('mixed', 'ensemble'),
    ('some without', 'ensemble_below'),
  ],
)
def test_sizes_learn_from_the_ensemble(kind, teacher):
  """With smoothed labels, also where mixup has blended them, or none is."""
  model, batch = tiny_model(), random_batch(16)
  labels = jax.nn.one_hot(batch['label'], 5)
  if kind == 'mixed':
    labels = batch['label'] = 0.7 * labels + 0.3 * labels[::-1]
  if kind == 'some without':
    labels = batch['label'] = labels.at[::3].set(0.0)
  state = make_state(model, mesh_lib.create(1))

  def total(params):
    sets = [
      (params['norm'][model.norm_set(r)], model.norm_set(r), r)
      for r in reversed(model.resolutions)
    ]
    logits = jnp.stack(
      [
        model.classify(
          params['base'],
          norm,
          state.batch_stats['norm'][name],
          batch['image'],
          r,
          train=True,
        )[0]
        for norm, name, r in sets
      ]
    )
    said = jax.lax.stop_gradient(losses.ensemble(logits, batch['label']))
    said = jax.nn.softmax(said)
    shares = jnp.full(len(sets), 0.3)
    if teacher == 'ensemble_below':  # the largest is the first
      shares = shares.at[0].set(0.0)
    shares = shares[:, None, None]
    targets = (1 - shares) * labels + shares * said
    if kind == 'some without':
      targets = targets.at[:, ::3].set(said[::3])
    smooth = optax.smooth_labels(targets, 0.1)
    return optax.softmax_cross_entropy(logits, smooth).mean(1).sum()

  value, grads = jax.jit(jax.value_and_grad(total))(state.params)
  new, metrics = take_step(model, 8, batch, 0.3, teacher)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  assert_trees_close(
    new.params, jax.tree.map(jnp.subtract, state.params, grads)
  )


def test_a_size_moves_its_own_statistics_only():
  model, batch = tiny_model(resolutions=(16, 32)), random_batch(16)
  new, _ = take_step(model, 1, batch)
  one, _ = take_step(tiny_model(resolutions=(32,)), 1, batch)
  # The statistics of 32 px are the same with and without 16 px beside it.
  assert_trees_close(
    new.batch_stats['norm']['r32'], one.batch_stats['norm']['r32']
  )
  ours, other = (
    jax.tree.leaves(new.batch_stats['norm'][name])[0] for name in ('r16', 'r32')
  )
  assert not np.allclose(ours, other)
