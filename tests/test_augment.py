# SPDX-License-Identifier: Apache-2.0
"""Mirroring, mixup and cutmix on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_batch, tiny_model
from test_routed import make_state, make_step, sharded

from drnet_jax import mesh as mesh_lib
from drnet_jax.errors import UserError
from drnet_jax.steps.augment import BatchAugmentation
from drnet_jax.steps.pretrain import PretrainObjective, PretrainStep

KEY = jax.random.key(2)


def augmented(batch, *, step=5, devices=1, **changes):
  mesh, augment = compiled(devices, **changes)
  copy = jax.tree.map(jnp.array, batch)
  return jax.device_get(augment(sharded(copy, mesh), KEY, step))


@functools.cache
def compiled(devices, **changes):
  settings = {
    'flip': 0.0,
    'mixup': 0.0,
    'cutmix': 0.0,
    'unlabelled': False,
    'num_classes': 5,
  }
  mesh = mesh_lib.create(devices)
  return mesh, BatchAugmentation(**settings | changes).compiled(mesh)


def test_no_label_is_a_distribution_of_zeros():
  batch = jax.device_get(random_batch(8, image_px=8))
  batch['label'] = np.where(np.arange(8) % 2, batch['label'], -1)
  found = augmented(batch, unlabelled=True)
  expected = np.eye(5)[batch['label']] * (batch['label'] >= 0)[:, None]
  np.testing.assert_array_equal(found['label'], expected)
  np.testing.assert_array_equal(found['image'], batch['image'])


def test_half_of_the_images_are_mirrored_and_nothing_else():
  batch = jax.device_get(random_batch(400, image_px=8))
  images = augmented(batch, flip=0.5)['image']
  mirrored = (images == batch['image'][:, :, ::-1]).all((1, 2, 3))
  same = (images == batch['image']).all((1, 2, 3))
  assert (mirrored ^ same).all()
  # Of 400 draws at 1/2: 200, and a standard deviation of 10.
  assert 160 < mirrored.sum() < 240
  assert images.dtype == np.uint8


@pytest.mark.parametrize('settings', [{'flip': 0.5}, {'mixup': 0.4, 'flip': 1}])
def test_draws_depend_on_the_step_and_not_on_devices(settings):
  batch = random_batch(16, image_px=8)
  one = augmented(batch, **settings)
  eight = augmented(batch, devices=8, **settings)
  jax.tree.map(np.testing.assert_array_equal, one, eight)
  later = augmented(batch, step=6, **settings)
  assert (one['image'] != later['image']).any()


def test_mixup_blends_pairs_and_their_labels_in_one_share():
  batch = jax.device_get(random_batch(16, image_px=8))
  mixed = augmented(batch, mixup=1.0)
  order = np.arange(16) ^ 1  # each with its neighbour
  own = np.eye(5)[batch['label']]
  differ = batch['label'] != batch['label'][order]
  (share,) = np.unique(mixed['label'][differ][own[differ] == 1].round(6))
  assert 0 < share < 1
  np.testing.assert_allclose(
    mixed['label'], share * own + (1 - share) * own[order], atol=1e-6
  )
  blend = share * batch['image'] + (1 - share) * batch['image'][order]
  np.testing.assert_allclose(mixed['image'], blend, atol=0.51)


def test_cutmix_pastes_a_box_and_counts_its_area():
  batch = jax.device_get(random_batch(8, image_px=16))
  boxes = 0
  for step in range(5):
    mixed = augmented(batch, cutmix=1.0, step=step)
    partner = batch['image'][np.arange(8) ^ 1]
    foreign = (mixed['image'] == partner).all((0, 3))
    own = (mixed['image'] == batch['image']).all((0, 3))
    assert (foreign ^ own).all()
    rows, columns = foreign.any(1).sum(), foreign.any(0).sum()
    assert foreign.sum() == rows * columns  # one box
    boxes += foreign.any()
    one_hot = np.eye(5)[batch['label']]
    share = own.mean()
    np.testing.assert_allclose(
      mixed['label'],
      share * one_hot + (1 - share) * one_hot[np.arange(8) ^ 1],
      atol=1e-6,
    )
  assert boxes >= 4


def test_with_both_each_batch_takes_one_of_them():
  batch = jax.device_get(random_batch(4, image_px=8))
  pasted = [
    np.isin(
      augmented(batch, mixup=1, cutmix=1, step=s)['image'], batch['image']
    )
    .all()
    .item()
    for s in range(10)
  ]
  assert 1 <= sum(pasted) <= 9


def test_odd_batches_cannot_be_paired():
  settings = BatchAugmentation(
    flip=0, mixup=0.2, cutmix=0, unlabelled=False, num_classes=5
  )
  with pytest.raises(UserError, match='batch_size = 15 is odd'):
    settings.check_batch(15, 'config.pretrain.batch_size')


def routed_step(model, mesh):
  return make_step(model, mesh, 16, gradient='all', loss='expected')


def pretrain_step(model, mesh):
  return PretrainStep(
    model,
    optax.sgd(1.0),
    mesh,
    PretrainObjective(label_smoothing=0.1, distill=0.0, teacher='largest'),
    batch_size=16,
    steps_per_epoch=1,
  )


@pytest.mark.slow
@pytest.mark.parametrize('create', [pretrain_step, routed_step])
def test_steps_take_distributions_as_labels(create):
  """The loss of a blend of labels is the blend of their losses."""
  model, mesh = tiny_model(resolutions=(16, 32)), mesh_lib.create(1)
  step, batch = create(model, mesh), random_batch(16)
  first, second = batch['label'], (batch['label'] + 1) % 5
  one_hot = jax.nn.one_hot(first, 5)
  blend = 0.7 * one_hot + 0.3 * jax.nn.one_hot(second, 5)

  def take(labels):
    batch_of = sharded(batch | {'label': labels}, mesh)
    state, metrics = step(make_state(model, mesh), batch_of, KEY)
    return metrics.get('cross_entropy', metrics['loss']), state.params

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    take(first),
    take(one_hot),
  )
  expected = 0.7 * take(first)[0] + 0.3 * take(second)[0]
  np.testing.assert_allclose(take(blend)[0], expected, rtol=1e-5)
