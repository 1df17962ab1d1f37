# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs against the JAX functions they were made from."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from conftest import tiny_model, tiny_trained

from drnet_jax.errors import UserError
from drnet_jax.export import onnx_graph
from drnet_jax.models import resnet

PX = 24


class MobileLike(nn.Module):
  """Depthwise and squeeze-excite blocks, 'SAME' padding, ReLU6, swish."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
    x = nn.BatchNorm(use_running_average=True)(x)
    x = jax.nn.relu6(x)
    y = nn.Conv(8, (5, 5), strides=2, feature_group_count=8)(x)
    y = nn.BatchNorm(use_running_average=True)(y)
    y = nn.swish(y)
    gate = y.mean((1, 2), keepdims=True)
    gate = nn.Conv(8, (1, 1))(nn.relu(nn.Conv(2, (1, 1))(gate)))
    y = y * jax.nn.sigmoid(gate)
    x = nn.avg_pool(x, (2, 2), strides=(2, 2), padding='SAME')
    x = jnp.concatenate([x + y, y], -1)
    return nn.Dense(5)(x.mean((1, 2)))


class Strange(nn.Module):
  """What else a network may do: norms, attention, slices, padding."""

  @nn.compact
  def __call__(self, x):
    x = jnp.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0)))[:, ::2, 1:-1:2]
    x = nn.Conv(8, (2, 2), strides=2, padding='VALID')(x)
    x = nn.GroupNorm(2)(x)
    x = nn.gelu(x, approximate=False) + nn.leaky_relu(x) + jnp.square(x)
    x = nn.max_pool(x, (2, 2), strides=(1, 1), padding='SAME')
    b, h, w, c = x.shape
    x = nn.LayerNorm()(x.reshape(b, h * w, c))
    x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
    first, second = jnp.split(x, 2, axis=-1)
    x = jnp.where(first > 0, second, jnp.clip(first, -0.5, 0.5))
    x = jnp.stack([x.max(1), x.min(1), x[:, 0]], 1).swapaxes(1, 2)
    return nn.Dense(5)(x.reshape(x.shape[0], -1) ** 3)


class Bfloat16(nn.Module):
  """A network that computes in bfloat16."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x)
    return nn.Dense(5, dtype=jnp.bfloat16)(nn.relu(x).mean((1, 2)))


def run(model, images):
  session = onnxruntime.InferenceSession(model.SerializeToString())
  return session.run(None, {'images': np.asarray(images)})[0]


def count_operators(model):
  return collections.Counter(node.op_type for node in model.graph.node)


def convert(function, dtype=jnp.float32, **options):
  return onnx_graph.convert(
    function,
    jax.ShapeDtypeStruct((PX, PX, 3), dtype),
    output_name='out',
    **options,
  )


def linen(network):
  """The network as a function, its norms' statistics not those of a start."""
  images = jax.random.normal(jax.random.key(0), (3, PX, PX, 3))
  variables = jax.jit(network.init)(jax.random.key(1), images)
  stats = jax.tree.map(
    lambda x: x + jax.random.uniform(jax.random.key(2), x.shape),
    variables.get('batch_stats', {}),
  )
  variables = variables | {'batch_stats': stats}
  return lambda x: network.apply(variables, x), images


@pytest.mark.parametrize('network', [MobileLike(), Strange()])
def test_networks_agree_with_jax(network):
  function, images = linen(network)
  expected = jax.jit(function)(images)
  for fold_norms in (True, False):
    model = convert(function, fold_norms=fold_norms)
    for batch in (3, 1):
      np.testing.assert_allclose(
        run(model, images[:batch]),
        expected[:batch],
        rtol=1e-4,
        atol=1e-4,
        err_msg=f'{fold_norms=}, {batch=}',
      )


def test_bfloat16_is_written_as_float32():
  function, images = linen(Bfloat16())
  found = run(convert(function), images)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, function(images), atol=0.02)


RESNET = {
  'network': 'resnet',
  'stage_sizes': (1, 1),
  'width': 4,
  'stem': 'imagenet',
}


@pytest.mark.parametrize(
  'base',
  [
    RESNET,
    RESNET | {'stem': 'cifar'},
    RESNET | {'stem': 'deep'},
    RESNET | {'stem': 'patch', 'patch_px': 5},
    RESNET
    | {
      'network': 'drnet_jax.models.resnet:ResNet',
      'block': resnet.BottleneckBlock,
    },
  ],
)
def test_resnets_agree_with_jax_from_bytes(base):
  model = tiny_model(base=base)
  params, stats = jax.jit(model.init)(jax.random.key(0))

  def function(images):
    return jax.nn.softmax(model.logits_at(params, stats, images, 16))

  exported = convert(function, jnp.uint8)
  images = np.random.default_rng(0).integers(0, 256, (2, PX, PX, 3), np.uint8)
  np.testing.assert_allclose(
    run(exported, images), jax.jit(function)(images), atol=1e-6
  )


def test_norms_vanish_and_layouts_are_not_shuffled():
  trained = tiny_trained(base=RESNET)

  def function(images):
    return trained.model.logits_at(
      trained.params, trained.batch_stats, images, 16
    )

  count = count_operators(convert(function, jnp.uint8))
  # The stem, two blocks of two, one shortcut.
  assert count['Conv'] == 6 and count['MaxPool'] == 1
  assert count['Transpose'] == 1, 'from bytes to channels first, once'
  # Pixel normalisation and the mean over pixels; the former's shift and two
  # shortcuts (the head's bias is 0). No norm is left.
  assert count['Mul'] == 2 and count['Add'] == 3
  assert count['Relu'] == 5  # in the form that runtimes fuse
  unfolded = count_operators(convert(function, jnp.uint8, fold_norms=False))
  assert unfolded['Mul'] == 2 + 6 and unfolded['Add'] == 3 + 6


def test_a_constant_that_repeats_an_image_is_not_lost():
  """[B, 1] times a row is larger than its input: no mere scale."""
  row = jnp.arange(1.0, 6.0)

  def function(x):
    return x.mean((1, 2, 3))[:, None] * row

  images = np.random.default_rng(0).random((2, PX, PX, 3), np.float32)
  np.testing.assert_allclose(
    run(convert(function), images), function(images), rtol=1e-5
  )


def test_a_value_used_twice_is_not_changed_by_what_follows_one_use():
  kernel = jax.random.normal(jax.random.key(0), (3, 3, 3, 4))

  def function(x):
    y = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return (y * 3 + y).mean((1, 2))

  images = np.random.default_rng(0).random((2, PX, PX, 3), np.float32)
  np.testing.assert_allclose(
    run(convert(function), images), function(images), rtol=1e-4
  )


def test_branches_that_are_known_are_taken():
  """What is written per platform runs as on any platform."""

  def function(x):
    x = jax.lax.platform_dependent(
      x, cpu=lambda x: jnp.sort(x, 1) * 2.0, default=lambda x: x * 2.0
    )
    x = jax.lax.cond(PX > 3, lambda x: x + 1.0, lambda x: jnp.sort(x, 1), x)
    return x.sum((1, 2))

  images = np.random.default_rng(0).random((2, PX, PX, 3), np.float32)
  np.testing.assert_allclose(
    run(convert(function), images), (images * 2 + 1).sum((1, 2)), rtol=1e-5
  )


def test_an_alias_is_not_changed_by_what_follows_it():
  """A padding of nothing: two names for one array, one of them scaled."""
  kernel = jax.random.normal(jax.random.key(0), (3, 3, 3, 4))

  def function(x):
    y = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    same = jnp.pad(y, ((0, 0),) * 4)
    return (same * 3 + 1).mean((1, 2)) - y.mean((1, 2))

  images = np.random.default_rng(0).random((2, PX, PX, 3), np.float32)
  np.testing.assert_allclose(
    run(convert(function), images), function(images), rtol=1e-4
  )


@pytest.mark.parametrize(
  'function, message',
  [
    (lambda x: jnp.sort(x.mean((1, 2)), -1), "primitive 'sort'"),
    (lambda x: x - x.sum(0), 'reduction over the batch'),
    (lambda x: x - x.mean(0), 'how many images'),
    (lambda x: x.mean((1, 2)) + jnp.arange(x.shape[0])[:, None], 'how many'),
    (lambda x: x.mean((1, 2)) + jnp.ones(x.shape[:1]).sum(), 'how many'),
    (lambda x: jnp.zeros((len(x), 5)) + x.mean(), 'x.shape'),
  ],
)
def test_what_cannot_be_exported_is_named(function, message):
  with pytest.raises(UserError, match=message):
    convert(function)
