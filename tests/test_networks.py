# SPDX-License-Identifier: Apache-2.0
"""Networks against PyTorch's, number for number (see torch_golden.py)."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_golden
from conftest import random_batch

from drnet_jax import flops, models
from drnet_jax.models import layers, ranet_blocks, torch_weights
from drnet_jax.models.mobilenet_v2 import InvertedResidual, MobileNetV2
from drnet_jax.models.random_choice import RandomChoice

with np.load(torch_golden.GOLDEN / 'torch.npz') as _file:
  GOLDEN = dict(_file)
FACTS = json.loads(GOLDEN.pop('facts').tobytes())
del FACTS['versions']


def create(description, num_classes=torch_golden.NUM_CLASSES):
  """A network from its name and fields, 'mobilenet_v2 width=0.75'."""
  name, *fields = description.split()
  arguments = {
    field: value if value.isalpha() else float(value)
    for field, value in (f.split('=') for f in fields)
  }
  return models.NETWORKS[name](num_classes=num_classes, **arguments)


@functools.cache
def shapes_of(network):
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  with layers.shapes_alone():
    return jax.eval_shape(
      lambda x: network.init(jax.random.key(0), x, train=False), image
    )


@functools.lru_cache(maxsize=1)
def load(key):
  """A network of the golden file with its weights."""
  description, _ = key.split('|')
  network = create(description)
  shapes = {k: tuple(v) for k, v in FACTS[key]['shapes'].items()}
  state = torch_golden.random_state(shapes)
  variables = torch_weights.to_variables(
    network, shapes_of(network), state, reset_head=False
  )
  return network, variables


# Plain, bottleneck and inverted residual blocks run with the quick tests.
QUICK = ('resnet18|torchvision', 'resnet50|torchvision', 'mobilenet_v2|')
SIZES = ('97', '224')  # odd, and even, before every stride
# More, and wider, of the blocks of others.
DEEP = (
  'resnet101',
  'resnet152',
  *(f'efficientnet_{kind}{i}|' for kind in ('b', 'lite') for i in range(1, 5)),
)


def marks(key, size_px):
  if size_px not in SIZES or key.startswith(DEEP):
    return [pytest.mark.slow, pytest.mark.soak]
  return [] if key.startswith(QUICK) else [pytest.mark.slow]


CASES = [
  pytest.param(key, int(size_px), marks=marks(key, size_px))
  for key, facts in FACTS.items()
  for size_px in facts['macs']
]


@pytest.mark.parametrize('key, size_px', CASES)
def test_logits_and_macs_are_pytorchs(key, size_px):
  network, variables = load(key)
  apply = jax.jit(lambda v, x: network.apply(v, x, train=False))
  images = torch_golden.random_images(size_px)
  logits = apply(variables, images)
  expected = GOLDEN[f'{key}|{size_px}']
  error = np.abs(logits - expected).max() / np.abs(expected).max()
  # On the last, PyTorch's own float32 is 2.4e-5 from its float64.
  assert error < (5e-5 if 'lite4' in key else 2e-5)
  # Of all images, since their shapes were traced already.
  counted = flops.count_macs(apply, variables, images)
  assert counted == len(images) * FACTS[key]['macs'][str(size_px)]


def test_every_named_network_is_in_the_golden_file():
  ours = {key.split('|')[0].split()[0] for key in FACTS}
  predictors = {'resnet10', 'resnet', 'inverted_residual4', 'random'}
  assert ours | predictors == set(models.NETWORKS)


@pytest.mark.parametrize('key', FACTS)
def test_state_dict_survives_there_and_back(key):
  description, naming = key.split('|')
  network = create(description)
  state = {
    name: np.arange(i, i + math.prod(shape), dtype=np.float32).reshape(shape)
    for i, (name, shape) in enumerate(FACTS[key]['shapes'].items())
  }
  variables = torch_weights.to_variables(
    network, shapes_of(network), state, reset_head=False
  )
  parameters = sum(x.size for x in jax.tree.leaves(variables['params']))
  assert parameters == FACTS[key]['parameters']
  back = torch_weights.to_state_dict(network, variables, naming=naming)
  counters = {k for k in back if k.endswith('num_batches_tracked')}
  assert {k.rpartition('.')[0] for k in counters} == {
    k.removesuffix('.running_mean')
    for k in state
    if k.endswith('.running_mean')
  }
  assert back.keys() - counters == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(back[name], x)


# torchvision's networks, and specs/drnet.md section 4: parameters, and
# multiply-adds by size in px, at as many digits as are printed there.
SPEC = {
  'resnet18': (11_689_512, {224: 1.814, 168: 1.114, 112: 0.485}),
  'resnet34': (21_797_672, {224: 3.664}),
  'resnet50': (25_557_032, {224: 4.089, 168: 2.503, 112: 1.078}),
  'resnet101': (44_549_160, {224: 7.80}),
  'resnet152': (60_192_808, {224: 11.51}),
  'mobilenet_v2': (3_504_872, {224: 0.3008, 192: 0.221}),
}


@pytest.mark.parametrize('name', SPEC)
def test_parameters_and_macs_of_the_spec(name):
  parameters, gmacs = SPEC[name]
  network = create(name, num_classes=1000)
  variables = shapes_of(network)
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  assert count == parameters
  for size_px, expected in gmacs.items():
    image = jax.ShapeDtypeStruct((1, size_px, size_px, 3), jnp.float32)
    macs = flops.count_macs(
      lambda v, x: network.apply(v, x, train=False), variables, image
    )
    digits = len(str(expected).partition('.')[2])
    assert round(macs / 1e9, digits) == expected


@pytest.mark.slow
@pytest.mark.skipif(
  not torch_golden.DATA.exists(), reason='DRNET_JAX_DATA is not there'
)
@pytest.mark.parametrize('file, name, padding, mean, std', torch_golden.REAL)
def test_real_weights_say_what_they_say_in_pytorch(
  file, name, padding, mean, std
):
  network = models.NETWORKS[name](num_classes=1000, padding=padding)
  state = torch_weights.read(str(torch_golden.DATA / f'{file}.npz'))
  variables = torch_weights.to_variables(
    network, shapes_of(network), state, reset_head=False
  )
  apply = jax.jit(lambda v, x: network.apply(v, x, train=False))
  with np.load(torch_golden.GOLDEN / 'torch_real.npz') as golden:
    for size_px in (torch_golden.REAL_SIZES[0], torch_golden.REAL_SIZES[-1]):
      logits = apply(variables, torch_golden.real_images(size_px, mean, std))
      expected = golden[f'{file}|{size_px}']
      error = np.abs(logits - expected).max() / np.abs(expected).max()
      assert error < 1e-4, size_px


def test_padding_as_tensorflow_pads():
  """At stride 2 an even side gets its one pixel of padding at the end."""
  x = jnp.arange(1.0, 5.0).reshape(1, 1, 4, 1) * jnp.ones((1, 4, 1, 1))
  for padding, columns in (('same', [6, 7]), ('symmetric', [3, 9])):
    for groups in (1, 2):  # an ordinary and a depthwise convolution
      wide = jnp.tile(x, groups)
      layer = layers.conv(
        groups, 3, 2, padding=padding, dtype='float32', name='c', groups=groups
      )
      kernel = jnp.zeros((3, 3, 1, groups)).at[1].set(1.0)
      y = layer.apply({'params': {'kernel': kernel}}, wide)
      # Sums of three columns of the row in the middle; outside are zeros.
      assert y[0, 0, :, 0].tolist() == columns
  with pytest.raises(ValueError, match='is not'):
    layers.conv(1, 3, padding='valid', dtype='float32', name='c')


@pytest.mark.parametrize('groups', [1, 6])
@pytest.mark.parametrize(
  'side, stride, padding',
  [
    (1, 1, 'SAME'),
    (1, 2, [(0, 0)] * 2),
    (3, 1, 'SAME'),
    (5, 2, [(2, 2)] * 2),
    (2, 2, 'SAME'),
  ],
)
def test_convolutions_of_cpus(monkeypatch, groups, side, stride, padding):
  """What runs in the place of a convolution is it, and so are gradients."""
  monkeypatch.setattr(layers, '_MANY_PIXELS', 72)
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (6, 9, 8, 6))
  features = 6 if groups == 6 else 4
  kernel = jax.random.normal(keys[1], (side, side, 6 // groups, features))

  def run(function):
    return lambda x, kernel: function(
      x,
      kernel,
      (stride, stride),
      padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  ours = run(layers._depthwise if groups > 1 else layers._dense)
  found, pullback = jax.vjp(ours, x, kernel)
  wanted, expected = jax.vjp(run(jax.lax.conv_general_dilated), x, kernel)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  cotangent = jax.random.normal(keys[2], found.shape)
  for a, b in zip(pullback(cotangent), expected(cotangent), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  half = jnp.bfloat16
  _, pullback = jax.vjp(ours, x.astype(half), kernel.astype(half))
  for a, b in zip(
    pullback(cotangent.astype(half)), expected(cotangent), strict=True
  ):
    assert a.dtype == half
    np.testing.assert_allclose(a.astype(float), b, atol=0.3, rtol=0.05)


def drawn(shapes):
  """Weights of the usual size, by NumPy: XLA takes long to compile a draw."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    if path[-1].key == 'kernel':
      deviation = np.sqrt(x.shape[-1] / x.size)  # 1 / sqrt(inputs)
      return rng.normal(0, deviation, x.shape).astype(x.dtype)
    return np.full(x.shape, path[-1].key in ('scale', 'var'), x.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
  'name',
  [
    'resnet10',
    # Its blocks are the next one's, but for what these have besides.
    pytest.param('mobilenet_v2', marks=[pytest.mark.slow, pytest.mark.soak]),
    pytest.param('efficientnet_b0', marks=pytest.mark.slow),
  ],
)
def test_bfloat16_computes_so_and_keeps_float32(name):
  make = models.NETWORKS[name]
  image = jnp.asarray(torch_golden.random_images(64))
  full, half = (make(num_classes=5, dtype=d) for d in ('float32', 'bfloat16'))
  variables = drawn(shapes_of(full))

  def train(x):
    return half.apply(
      variables,
      x,
      train=True,
      mutable=['batch_stats'],
      rngs={'dropout': jax.random.key(1)},
    )

  jaxpr, (logits, moved) = jax.make_jaxpr(train, return_shape=True)(image)
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype('float32')}
  assert 'bf16' in str(jaxpr)
  found, expected = (
    jax.jit(lambda x, n=n: n.apply(variables, x, train=False))(image)
    for n in (half, full)
  )
  np.testing.assert_allclose(found, expected, atol=0.05, rtol=0.05)


def test_round_channels():
  # 32 x .35 = 11.2 -> 8 would lose more than a tenth -> 16; 24 x .75 = 18 -> 16
  # would too -> 24; 96 x 1.4 = 134.4 -> 136.
  assert [layers.round_channels(c) for c in (11.2, 18, 134.4, 3)] == [
    16,
    24,
    136,
    8,
  ]


def test_stochastic_depth_drops_whole_images():
  """In training an image is either its shortcut, or all of the block."""
  block = InvertedResidual(
    features=3,
    expansion=2,
    kernel=3,
    stride=1,
    squeeze=1,
    drop=0.5,
    activation=nn.silu,
    padding='symmetric',
    epsilon=1e-5,
    dtype='float32',
  )
  x = jax.random.normal(jax.random.key(0), (64, 6, 6, 3))
  variables = block.init(jax.random.key(1), x, train=False)
  y, _ = block.apply(
    variables,
    x,
    train=True,
    mutable=['batch_stats'],
    rngs={'dropout': jax.random.key(2)},
  )
  same = np.asarray(x == y).reshape(64, -1)
  assert (same.all(1) | ~same.any(1)).all()
  # Of 64 draws at 1/2: 32, and a standard deviation of 4.
  assert 18 < same.all(1).sum() < 46


def test_random_choice_is_even_and_repeats_itself():
  images = random_batch(600)['image'].astype(jnp.float32) / 255
  network = RandomChoice(num_classes=3)
  choose = jax.jit(lambda x: network.apply({}, x, train=False).argmax(-1))
  choice = np.asarray(choose(images))
  np.testing.assert_array_equal(choice, choose(images))
  # Of 600 draws at 1/3 each: 200, and a standard deviation of 11.5.
  assert all(150 < n < 250 for n in np.bincount(choice, minlength=3))
  assert not network.apply({}, images, train=True).any()
  assert flops.count_macs(choose, images[:1]) == 0


def test_predictor_of_mobilenet_fits_the_papers_budget():
  network = models.NETWORKS['inverted_residual4'](num_classes=3)
  assert isinstance(network, MobileNetV2)
  variables = shapes_of(network)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  macs = flops.count_macs(
    lambda v, x: network.apply(v, x, train=False), variables, image
  )
  assert macs == 4_749_440
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == 248_851


@pytest.mark.parametrize(
  'pool',
  [
    lambda x: layers.pool_and_classify(x, 4),
    lambda x: ranet_blocks.Mean()(x),
  ],
)
def test_pixels_of_bfloat16_are_averaged_in_float32(pool):
  """Not rounded between the mean and the head."""

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      return pool(x)

  x = jax.random.uniform(jax.random.key(0), (2, 7, 7, 16), jnp.bfloat16) + 4
  variables = Network().init(jax.random.key(1), x)
  found, expected = (
    Network().apply(variables, y) for y in (x, x.astype(jnp.float32))
  )
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-6)
