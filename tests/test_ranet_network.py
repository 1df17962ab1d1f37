# SPDX-License-Identifier: Apache-2.0
"""RANet against figures of the authors' PyTorch code.

Costs and parameters are what their counter prints; logits, losses and gradient
norms are theirs in float64 on weights and images that depend on shapes alone.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drnet_jax import losses, models
from drnet_jax.errors import UserError
from drnet_jax.models import ranet_blocks, ranet_network

# Configurations of the authors' scripts that are nobody's model, and two of
# ours, by their fields.
_C = {'stem': 'cifar', 'width': 16, 'growth': 6, 'layers': 4}
FIELDS = {
  'defaults': _C | {'levels': (1, 2, 3), 'factors': (4, 2, 1)},
  'old launcher': _C | {'levels': (1, 2, 2, 3), 'factors': (4, 2, 2, 1)},
  'script': {
    'stem': 'imagenet',
    'width': 16,
    'growth': 16,
    'layers': 8,
    'levels': (1, 2, 3, 4),
    'factors': (4, 2, 1, 1),
  },
  'tiny imagenet': {
    'stem': 'imagenet',
    'width': 4,
    'growth': 4,
    'layers': 2,
    'levels': (1, 2, 3, 4),
    'factors': (4, 2, 2, 1),
  },
}

# Multiply-adds and parameters up to each exit.
COSTS = {
  ('cifar_anytime', 10): (
    '15814410 31283220 44655390 50358312 60654578 63647996 90173958 94904592',
    '470442 1073780 1476756 1868414 2165612 2453494 2871636 3261830',
  ),
  ('cifar_anytime', 100): (
    '15826020 31306440 44690220 50404752 60712628 63717656 90255228 94997472',
    '482052 1097000 1511586 1914854 2223662 2523154 2952906 3354710',
  ),
  ('cifar_budgeted_small', 10): (
    '8360714 21765140 32844062 41523752 53225778 58921020',
    '347050 876660 1270165 1754271 2130143 2547601',
  ),
  ('cifar_budgeted_small', 100): (
    '8372324 21788360 32878892 41570192 53283828 58990680',
    '358660 899880 1304995 1800711 2188193 2617261',
  ),
  ('cifar_budgeted_medium', 10): (
    '10736394 24140820 35219742 43899432 55601458 61296700 105558854 117267536',
    '349386 878996 1272501 1756607 2132479 2549937 3254919 3967697',
  ),
  ('cifar_budgeted_medium', 100): (
    '10748004 24164040 35254572 43945872 55659508 61366360 105640124 117360416',
    '360996 902216 1307331 1803047 2190529 2619597 3336189 4060577',
  ),
  ('cifar_budgeted_large', 10): (
    '10728202 24132628 35211550 43891240 93010226 114607676 163942086 '
    '175650768',
    '356330 885940 1279445 1763551 2659597 3616119 4381329 5094107',
  ),
  ('cifar_budgeted_large', 100): (
    '10739812 24155848 35246380 43937680 93068276 114677336 164023356 '
    '175743648',
    '367940 909160 1314275 1809991 2717647 3685779 4462599 5186987',
  ),
  ('defaults', 10): (
    '13438730 28907540 42279710 47982632 58278898 61272316',
    '468106 1071444 1474420 1866078 2163276 2451158',
  ),
  ('old launcher', 10): (
    '15806218 31275028 44647198 50350120 88770994 98135740 127396678 132127312',
    '477386 1080724 1483700 1875358 2536079 3113689 3560612 3950806',
  ),
  ('cifar_tiny', 10): (
    '8360714 16097300 22195742 25350440 29888754 31728636',
    '347050 746388 1027102 1308024 1530662 1753840',
  ),
  ('imagenet', 1000): (
    '434968808 888669904 1153356020 1352449308 2279913603 2588473759 '
    '3235517799 3333484943',
    '14083432 48077136 60103248 78659176 100951482 130170440 139095138 '
    '149144186',
  ),
  ('imagenet_budgeted_small', 1000): (
    '246472360 631164048 860403190 1041144878 1869847124 2160379452 '
    '2734279235 2828311039',
    '9916712 37916432 48345820 65121348 85601768 113060656 121474513 131123991',
  ),
  ('script', 1000): (
    '168066600 520465424 731890809 903794197 1052251864 1118803728 1589013903 '
    '1680979979',
    '8090920 33314832 42982814 58901892 63997294 70852502 78532931 87972617',
  ),
  ('tiny imagenet', 1000): (
    '8812904 11158752 12542255 13443207 18390138 19724242 23034184 23441436',
    '101696 321032 412854 542830 690846 876566 943810 1021880',
  ),
}
QUICK = ('cifar_tiny', 'tiny imagenet')
# Of as many classes and the same blocks as another, for longer.
DEEP = ('cifar_budgeted_large', 'imagenet_budgeted_small', 'script')


def create(name, num_classes=10):
  network = FIELDS.get(name, {'configuration': name})
  is_imagenet = 'imagenet' in (network.get('stem'), name.partition('_')[0])
  return models.create_ranet(
    network=network,
    image_px=224 if is_imagenet else 32,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    num_classes=num_classes,
  )


@pytest.mark.parametrize(
  'name, classes',
  [
    pytest.param(
      *key,
      marks=()
      if key[0] in QUICK
      # Of a hundred classes only the heads are others.
      else [
        pytest.mark.slow,
        *[pytest.mark.soak] * (key[1] == 100 or key[0] in DEEP),
      ],
    )
    for key in COSTS
  ],
)
def test_costs_and_parameters_are_the_authors(name, classes):
  macs, parameters = (
    [int(x) for x in row.split()] for row in COSTS[name, classes]
  )
  found, _, _ = traced(name, classes)
  assert found == list(zip(macs, parameters, strict=True))


@functools.cache
def traced(name, classes):
  """Of one tracing, which takes seconds.

  Returns:
    Multiply-adds and parameters up to each exit; channels and side of each
    block's output, as 'C@H'; the shapes of the variables.
  """
  model, blocks, variables = create(name, classes), [], {}

  def note(call, args, kwargs, context):
    result = call(*args, **kwargs)
    if isinstance(context.module, ranet_blocks.Block):
      blocks.append(f'{result[0].shape[-1]}@{result[0].shape[1]}')
    if context.module.path == () and context.method_name == '__call__':
      variables.update(jax.eval_shape(lambda: context.module.variables))
    return result

  with flax.linen.intercept_methods(note):
    costs = model.macs_and_parameters
  return costs, ' '.join(blocks), variables


def test_blocks_of_the_anytime_model():
  assert traced('cifar_anytime', 10)[1] == (
    '160@8 256@8 100@16 92@8 140@8 188@8 50@32 46@16 87@16 69@8 93@8 117@8 '
    '50@32 46@32 87@32 138@16 101@16 156@8 180@8 204@8'
  )


def pseudo_random(shape):
  """Depends on the shape alone; row-major, in PyTorch's order of axes."""
  j = np.arange(np.prod(shape), dtype=np.int64)
  h = ((7919 * j + 12345) % 10007) / 10007 - 0.5
  return h.reshape(shape)


def pseudo_random_variables(shapes):
  def weights(path, x):
    if path[-1] == 'scale' or path[-1] == 'var':
      return np.ones(x.shape, np.float32)
    if path[-1] != 'kernel':
      return np.zeros(x.shape, np.float32)
    if len(x.shape) == 4:
      h, w, inputs, outputs = x.shape
      value = pseudo_random((outputs, inputs, h, w)).transpose(2, 3, 1, 0)
      return np.float32(value * np.sqrt(12) * np.sqrt(2 / (inputs * h * w)))
    inputs, outputs = x.shape
    value = pseudo_random((outputs, inputs)).T
    return np.float32(value * np.sqrt(12) * np.sqrt(1 / inputs))

  return flax.traverse_util.unflatten_dict(
    {
      path: weights(path, x)
      for path, x in flax.traverse_util.flatten_dict(shapes).items()
    }
  )


@functools.cache
def batch_of(name):
  """A network, its variables, images and labels."""
  classes = 1000 if name == 'tiny imagenet' else 10
  network, (*_, shapes) = create(name, classes).network, traced(name, classes)
  batch, side_px = (2, 224) if name == 'tiny imagenet' else (4, 32)
  images = 2 * pseudo_random((batch, 3, side_px, side_px))
  images = jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float32)
  labels = 3 * jnp.arange(batch) % 10
  return network, pseudo_random_variables(shapes), images, labels


def cross_entropy(logits, labels):
  """[E], of each exit."""
  labels = jnp.broadcast_to(labels[:, None], logits.shape[:-1])
  return losses.cross_entropy(logits, labels, label_smoothing=0.0).mean(0)


@functools.cache
def trained(name):
  """Logits [B, E, K] and new statistics of a batch in training."""
  network, variables, images, _ = batch_of(name)
  return jax.jit(
    lambda v: network.apply(v, images, train=True, mutable=['batch_stats'])
  )(variables)


def gradient_norm(name, dtype):
  network, variables, images, labels = batch_of(name)
  network = network.clone(dtype=dtype)
  variables, images = jax.tree.map(
    lambda x: jnp.asarray(x, dtype), (variables, images)
  )

  def loss(params):
    logits, _ = network.apply(
      variables | {'params': params},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    return cross_entropy(logits, labels).sum()

  grads = jax.jit(jax.grad(loss))(variables['params'])
  squares = [np.square(g).sum() for g in jax.tree.leaves(grads)]
  return float(np.sqrt(sum(squares)))


# (exit, row) to its first logits.
TRAIN = {
  'cifar_tiny': {
    (1, 0): (0.2320781, -0.0093022, 0.0787586, -0.2595750),
    (1, 1): (-0.2164773, 0.0731462, 0.4911769, 0.4121888),
    (2, 0): (-0.1212326, 0.1931849, 0.0008146, -0.2562871),
    (3, 0): (-0.2194172, 0.1364974, -0.0227235, -0.1408125),
    (4, 0): (0.2496594, 0.2284900, 0.2990770, -0.1726224),
    (5, 0): (-0.3537879, 0.0373893, 0.1868766, -0.0115702),
    (6, 0): (-0.2942122, 0.1911383, -0.2275448, 0.0229388),
    (6, 1): (0.0574903, -0.2329544, 0.2615264, -0.0859492),
  },
  'cifar_anytime': {
    (1, 0): (0.088892, -0.237097, -0.125580, -0.160312),
    (3, 0): (0.014391, -0.203158, 0.000517, 0.040890),
    (5, 0): (-0.021691, -0.420629, 0.047878, -0.570494),
    (7, 0): (-0.384556, 0.038834, -0.098659, 0.320332),
    (8, 0): (-0.296592, -0.081761, 0.189726, 0.063186),
  },
  'tiny imagenet': {
    (1, 0): (-0.108947, -0.241470, 0.091020, -0.041503),
    (8, 0): (-0.061223, -0.357436, 0.022074, -0.234080),
  },
}
LOSS_AND_GRADIENT = {
  'cifar_tiny': (14.21544376, 66.75149394),
  'cifar_anytime': (18.53064840, 153.73999144),
  'tiny imagenet': (55.39152849, 282.296246),
}


@pytest.mark.parametrize(
  'name',
  [
    'cifar_tiny',
    pytest.param('tiny imagenet', marks=pytest.mark.slow),
    # More of the same blocks.
    pytest.param('cifar_anytime', marks=[pytest.mark.slow, pytest.mark.soak]),
  ],
)
def test_training_logits_and_loss_are_the_authors(name):
  logits = np.asarray(trained(name)[0])
  for (exit_number, row), expected in TRAIN[name].items():
    np.testing.assert_allclose(
      logits[row, exit_number - 1, :4], expected, atol=3e-5
    )
  loss = cross_entropy(logits, batch_of(name)[-1]).sum()
  assert float(loss) == pytest.approx(LOSS_AND_GRADIENT[name][0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, dtype, tolerance',
  [
    ('cifar_tiny', 'float32', 1e-5),
    pytest.param('tiny imagenet', 'float32', 1e-5, marks=pytest.mark.soak),
    # In float32 2e-4 off, by rounding.
    pytest.param('cifar_anytime', 'float64', 1e-7, marks=pytest.mark.soak),
  ],
)
def test_gradients_are_the_authors(name, dtype, tolerance):
  expected = LOSS_AND_GRADIENT[name][1]
  with jax.enable_x64(dtype == 'float64'):
    norm = gradient_norm(name, dtype)
  assert norm == pytest.approx(expected, rel=tolerance)


def evaluated(name):
  network, variables, images, labels = batch_of(name)
  logits = jax.jit(functools.partial(network.apply, train=False))(
    variables, images
  )
  return np.asarray(logits), np.asarray(cross_entropy(logits, labels))


def test_evaluation_is_the_authors():
  logits, loss = evaluated('cifar_tiny')
  expected = [
    (0.0267385, -0.0069930, 0.0075984, -0.0423603),
    (0.0173023, -0.0033706, 0.0264915, -0.0146486),
    (0.0093221, -0.0066543, 0.0131736, -0.0079854),
    (-0.0452729, -0.0729376, -0.0051896, -0.0010961),
    (-0.0061316, -0.0058809, 0.0016126, -0.0068422),
    (-0.0041634, 0.0072903, 0.0043951, -0.0054190),
  ]
  np.testing.assert_allclose(logits[0, :, :4], expected, atol=1e-5)
  np.testing.assert_allclose(
    loss,
    (2.2812498, 2.3048785, 2.3044166, 2.2879432, 2.3063612, 2.3037095),
    atol=1e-6,
  )


@pytest.mark.slow
def test_evaluation_of_the_imagenet_stem_is_the_authors():
  assert evaluated('tiny imagenet')[1].sum() == pytest.approx(
    55.269152, rel=1e-6
  )


def test_running_statistics_of_the_first_norm():
  stats = trained('cifar_tiny')[1]['batch_stats']['stem']['base3_norm']
  np.testing.assert_allclose(
    stats['mean'][:3], (9.9225e-05, -2.07121e-04, -2.7640e-05), atol=1e-7
  )
  # PyTorch's running variance is the unbiased one, of n = 4 x 32 x 32 pixels.
  n = 4 * 32 * 32
  biased = (
    0.9
    + (np.array((1.0377093219, 1.0458748797, 1.0475275074)) - 0.9) * (n - 1) / n
  )
  np.testing.assert_allclose(stats['var'][:3], biased, atol=1e-6)


@pytest.mark.parametrize('old, new', [(16, 8), (8, 16), (8, 32), (5, 1)])
def test_resizing_aligns_the_corners(old, new):
  x = np.random.default_rng(0).normal(size=(2, old, old, 3)).astype(np.float32)
  found = np.asarray(ranet_blocks.resize_aligned(x, (new, new)))
  grid = np.arange(new) * (old - 1) / max(new - 1, 1)
  along = np.apply_along_axis(
    lambda line: np.interp(grid, np.arange(old), line), 1, x
  )
  expected = np.apply_along_axis(
    lambda line: np.interp(grid, np.arange(old), line), 2, along
  )
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_initial_weights():
  """Blocks and exits as He over the outputs, the stem as PyTorch's default."""
  params, _ = create('cifar_tiny').init(jax.random.key(0))
  params = params['network']
  kernel = params['exit6']['unit2_conv']['kernel']
  assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
  bound = 1 / np.sqrt(9 * 16)
  stem = np.abs(params['stem']['base2_conv']['kernel'])
  assert 0.98 * bound < stem.max() <= bound
  head = params['exit1']['head']
  assert np.abs(head['kernel']).max() <= 1 / np.sqrt(128)
  assert not head['bias'].any()
  assert params['stem']['base2_norm']['scale'].all()


def test_initial_weights_are_finite_whatever_is_drawn(monkeypatch):
  """One draw in 2^23 is -1, and ImageNet's network takes 149 million."""
  monkeypatch.setattr(
    jax.random, 'uniform', lambda key, shape, minval: jnp.full(shape, minval)
  )
  weights = create('cifar_tiny').init(jax.random.key(0))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(weights))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'growth': 3}, 'no whole one to the coarser'),
    ({'levels': (1, 1, 2), 'factors': (4, 2, 1)}, 'only the first'),
    ({'levels': (2, 2, 3)}, 'ascend from 1'),
    ({'levels': (1, 3, 2)}, 'ascend from 1'),
    ({'levels': (1, 2)}, 'one entry for each'),
    ({'stem': 'patch'}, "not one of 'cifar', 'imagenet'"),
    ({'layers': 0}, 'layers = 0'),
    ({'configuration': 'A'}, 'is not one of'),
    ({'depth': 3}, 'depth'),
  ],
)
def test_configurations_that_cannot_work(changes, message):
  network = {'configuration': 'cifar_tiny'} | changes
  with pytest.raises(UserError, match=message):
    models.create_ranet(
      network=network,
      image_px=32,
      mean=(0.5,) * 3,
      std=(0.5,) * 3,
      num_classes=10,
    )


def test_one_layer_and_other_sides_run():
  """Where the authors' code fails: one layer, exits that are not 8 x 8."""
  network = ranet_network.configured(
    'cifar_tiny', layers=1, levels=(1, 2), factors=(2, 1), num_classes=7
  )
  shape = jax.eval_shape(
    lambda x: network.init_with_output(jax.random.key(0), x, train=True)[0],
    jax.ShapeDtypeStruct((2, 48, 48, 3), jnp.float32),
  )
  assert shape.shape == (2, 4, 7)
