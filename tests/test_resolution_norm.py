# SPDX-License-Identifier: Apache-2.0
"""Norms of any network, also of one that our code has never seen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from drnet_jax.errors import UserError
from drnet_jax.models import resolution_norm


class Strange(nn.Module):
  """Odd names, nested norms, a layer norm, a bias, dropout."""

  num_classes: int

  @nn.compact
  def __call__(self, pixels, *, train):
    x = nn.Conv(6, (3, 3), (2, 2), name='eye')(pixels)
    x = Inner(name='brain')(x, not train)
    x = nn.LayerNorm(name='calm')(x).mean((1, 2))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(self.num_classes)(x)


class Inner(nn.Module):
  @nn.compact
  def __call__(self, x, frozen):
    return nn.gelu(nn.BatchNorm(use_running_average=frozen, name='scale')(x))


class OwnNorm(nn.Module):
  """Keeps batch statistics without being a BatchNorm."""

  num_classes: int

  @nn.compact
  def __call__(self, x, *, train):
    mean = self.variable('batch_stats', 'mean', jnp.zeros, ())
    if train:
      mean.value = x.mean()
    return nn.Dense(self.num_classes)((x - mean.value).mean((1, 2)))


class Hollow(nn.Module):
  """Has a layer without outputs, which not every initialiser minds."""

  num_classes: int

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Conv(0, (3, 3), kernel_init=nn.initializers.zeros, name='none')(x)
    return nn.Dense(
      self.num_classes, kernel_init=nn.initializers.zeros, name='head'
    )(x.mean((1, 2)))


def test_split_takes_the_batch_norms_and_nothing_else():
  image = jnp.zeros((1, 8, 8, 3))
  variables = Strange(5).init(jax.random.key(0), image, train=False)
  shared, norm = resolution_norm.split(
    variables['params'], variables['batch_stats']
  )
  assert list(norm) == ['brain'] and set(norm['brain']['scale']) == {
    'scale',
    'bias',
  }
  assert set(shared) == {'eye', 'calm', 'Dense_0'}
  merged = resolution_norm.merge(shared, norm)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: (a == b).all(), merged, variables['params'])
  )


def test_a_strangers_network_gets_private_norms():
  model = tiny_model(base={'network': 'test_resolution_norm:Strange'})
  params, stats = model.init(jax.random.key(0))
  assert set(params['norm']) == {'r16', 'r24', 'r32'}
  images = jax.random.randint(jax.random.key(1), (4, 32, 32, 3), 0, 256)
  logits, moved = model.classify(
    params['base'],
    params['norm']['r24'],
    stats['norm']['r24'],
    images.astype(jnp.uint8),
    24,
    train=True,
    mask=jnp.array([True, True, True, False]),
    key=jax.random.key(2),
  )
  assert logits.shape == (4, 5) and jnp.isfinite(logits).all()
  before = stats['norm']['r24']['brain']['scale']['mean']
  assert not np.allclose(moved['brain']['scale']['mean'], before)


def test_masked_images_do_not_count():
  model = tiny_model()
  params, stats = model.init(jax.random.key(0))
  images = jax.random.randint(jax.random.key(1), (6, 32, 32, 3), 0, 256)
  images = images.astype(jnp.uint8)

  def run(images, mask):
    return model.classify(
      params['base'],
      params['norm']['r16'],
      stats['norm']['r16'],
      images,
      16,
      train=True,
      mask=mask,
    )

  keep = np.array([0, 2, 3])
  mask = np.isin(np.arange(6), keep)
  padded, padded_stats = run(images, jnp.asarray(mask))
  alone, alone_stats = run(images[keep], None)
  np.testing.assert_allclose(padded[keep], alone, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    padded_stats,
    alone_stats,
  )


def test_statistics_that_cannot_be_masked_are_refused():
  with pytest.raises(UserError, match='no flax.linen.BatchNorm'):
    tiny_model(base={'network': 'test_resolution_norm:OwnNorm'})


def test_empty_layers_are_refused():
  with pytest.raises(UserError, match='base cannot run at 16 px: .* is empty'):
    tiny_model(base={'network': 'test_resolution_norm:Hollow'})
