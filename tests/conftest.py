# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices for every test, and quick rather than fast compilation."""

import contextlib
import csv
import fcntl
import functools
import gc
import io
import os
import tempfile
from importlib import metadata

QUICK = (
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  '--xla_cpu_parallel_codegen_split_count=1',
)
if tuple(map(int, metadata.version('jaxlib').split('.')[:2])) < (0, 11):
  # The emitters that XLA had before compile in a third of the time.
  QUICK += ('--xla_cpu_use_fusion_emitters=false',)
# Each once, and in the same order in workers and their children: the text is
# part of the key of what was compiled.
os.environ['XLA_FLAGS'] = ' '.join(
  dict.fromkeys(
    [
      *os.environ.get('XLA_FLAGS', '').split(),
      '--xla_force_host_platform_device_count=8',
      *QUICK,
    ]
  )
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['ORT_DISABLE_TELEMETRY'] = '1'
# Nothing that was worked out before, nothing left behind.
_CACHE = tempfile.TemporaryDirectory()
os.environ['XDG_CACHE_HOME'] = _CACHE.name
# But what one test compiled, whoever needs it next: workers and the commands
# that tests start inherit the first one's folder. `make` keeps it for longer.
_PROGRAMS = tempfile.TemporaryDirectory()
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _PROGRAMS.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

# Tracing makes objects by the million, few of them in cycles; looking for these
# as often as is usual takes up to a seventh of its time.
gc.set_threshold(100_000, 20, 100)

import jax  # noqa: E402  (the flags must come first)
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from PIL import Image  # noqa: E402

from configs import cifar10_ranet_tiny, smoke  # noqa: E402
from drnet_jax import models  # noqa: E402
from drnet_jax.choosing import record  # noqa: E402
from drnet_jax.choosing.options import Costs, Options  # noqa: E402
from drnet_jax.data import scaled_digits, sources  # noqa: E402
from drnet_jax.models import layers  # noqa: E402
from drnet_jax.run import workdir  # noqa: E402
from drnet_jax.run.checkpoint import Checkpoints  # noqa: E402


def pytest_collection_modifyitems(items):
  """The longest files first: the last keeps one worker alone."""
  items.sort(key=lambda item: -item.path.stat().st_size)


@pytest.fixture(autouse=True, scope='session')
def parsed_flags():
  """TFDS and Grain read absl flags."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """One prepared copy of scaled_digits for all tests of all workers."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  with open(base / 'digits.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    name = scaled_digits.ScaledDigits.name  # its import registers it
    sources.load(name, 'test', data_dir=str(base / 'digits'))
  return str(base / 'digits')


@contextlib.contextmanager
def compilations():
  """A list that every compilation by XLA within the context is added to."""
  compiled = []

  def listen(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
  finally:
    jax.monitoring.clear_event_listeners()


@pytest.fixture
def shapes_alone():
  """In a test that uses this, fresh convolutions have weights of zeros."""
  with layers.shapes_alone():
    yield


_NETWORK = {
  'network': 'resnet',
  'stage_sizes': (1,),
  'width': 4,
  'stem': 'patch',
  'patch_px': 4,
}


RANET = {
  'stem': 'cifar',
  'width': 4,
  'growth': 4,
  'levels': (1, 2),
  'factors': (2, 1),
  'layers': 1,
}


def once(function):
  """Remembers by how the arguments look, for dicts cannot be hashed."""
  known = {}

  @functools.wraps(function)
  def call(**kwargs):
    key = repr(sorted(kwargs.items()))
    if key not in known:
      known[key] = function(**kwargs)
    return known[key]

  return call


@once
def tiny_model(**changes):
  """A DRNet of three sizes that compiles in a second."""
  settings = {
    'base': _NETWORK,
    'predictor': _NETWORK,
    'predictor_px': 16,
    'image_px': 32,
    'resolutions': (16, 24, 32),
    'resolution_aware_bn': True,
    'antialias': True,
    'mean': (0.5, 0.5, 0.5),
    'std': (0.25, 0.25, 0.25),
    'num_classes': 5,
  }
  return models.create_drnet(**settings | changes)


def random_batch(size: int, *, image_px: int = 32, seed: int = 0):
  """uint8 images of differing brightness, and labels of five classes."""
  keys = jax.random.split(jax.random.key(seed), 2)
  shape = (size, image_px, image_px, 3)
  return {
    'image': jax.random.randint(keys[0], shape, 0, 256).astype('uint8'),
    'label': jax.random.randint(keys[1], (size,), 0, 5),
  }


@once
def tiny_trained(*, has_router: bool = True, spread: float = 1.0, **changes):
  """A model whose predictor uses every size, as if it had been trained.

  Args:
    has_router: whether the predictor counts as trained.
    spread: of the weights and statistics added to those of a fresh model, so
      that norms do something.
    **changes: to `tiny_model`.
  """
  model = tiny_model(**changes)
  params, batch_stats = jax.jit(model.init)(jax.random.key(3))
  keys = iter(jax.random.split(jax.random.key(4), 1000))

  def shaken(x):
    return x + spread * 0.3 * jax.random.uniform(next(keys), x.shape)

  params['norm'] = jax.tree.map(shaken, params['norm'])
  batch_stats = jax.tree.map(shaken, batch_stats)
  head = params['predictor']['head']
  head['kernel'] = 8 * head['kernel']
  return workdir.Trained(
    model=model,
    params=params,
    batch_stats=batch_stats,
    has_router=has_router,
    class_names=tuple('abcde'),
    config=smoke.get_config(),
    origin='a test',
  )


@functools.cache
def _jitted(model):
  """What `recorded` runs: the logits of all options, and the router's."""

  def scores(predictor, stats, images):
    return model.predict(predictor, stats, images, train=False)[0]

  return jax.jit(model.all_logits), jax.jit(scores)


def recorded(trained, images, labels=None):
  """What every option of a model says of images, run densely.

  Args:
    trained: the model.
    images: uint8 [N, H, H, 3].
    labels: int [N]; by default what the last option says.
  """
  weights = trained.params, trained.batch_stats
  all_logits, scores = _jitted(trained.model)
  logits = all_logits(*weights, images)
  p = np.asarray(jax.nn.softmax(logits))
  label = p[:, -1].argmax(-1) if labels is None else np.asarray(labels)
  log_p = None
  if trained.has_router:
    said = scores(*(x['predictor'] for x in weights), images)
    log_p = np.asarray(jax.nn.log_softmax(said))
  options, macs = Options.of(trained.model.options), trained.model.macs()
  return record.Record(
    options=options,
    costs=Costs('GMACs', macs.gmacs, macs.predictor / 1e9, ''),
    label=label,
    columns=options.columns,
    **record.said(p, label, options.columns),
    log_p=log_p,
    draw=np.array([record.checksum(x) for x in images]),
    extra={'index': np.arange(len(images))},
    probabilities=p,
  )


@once
def tiny_exits():
  """A network whose four exits disagree, as if it had been trained."""
  model = models.create_ranet(
    network=RANET,
    image_px=16,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    num_classes=5,
  )
  params, batch_stats = jax.jit(model.init)(jax.random.key(0))
  network = params['network']
  for k in range(1, len(model.options) + 1):
    head = network[f'exit{k}']['head']
    head['kernel'] = head['kernel'] * 6
  return workdir.Trained(
    model=model,
    params=params,
    batch_stats=batch_stats,
    has_router=False,
    class_names=tuple('abcde'),
    config=cifar10_ranet_tiny.get_config(),
    origin='a test',
  )


@pytest.fixture(scope='session')
def trained():
  """The tiny model with a router, as most tests of serving want it."""
  return tiny_trained()


def rows_of(*path):
  """Rows of a csv file, each a dict."""
  with open(os.path.join(*path), newline='') as file:
    return list(csv.DictReader(file))


def pictures(count, *, side=32, seed=0):
  """Pictures of differing brightness and contrast: the router tells them."""
  rng = np.random.default_rng(seed)
  low = rng.integers(0, 200, (count, 1, 1, 3))
  span = rng.integers(1, 56, (count, 1, 1, 1))
  noise = rng.integers(0, 1000, (count, side, side, 3))
  return (low + noise % span).astype(np.uint8)


def encoded(image, format='PNG', **options) -> bytes:
  """A file of an array, or of a PIL image."""
  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def pack(path, files, **arrays) -> str:
  """Writes a packed file of images, and `label`, `split`, `class_name`."""
  np.savez(
    path,
    data=np.frombuffer(b''.join(files), np.uint8),
    offsets=np.cumsum([0, *map(len, files)]),
    **arrays,
  )
  return str(path)


@pytest.fixture(scope='session')
def run(data_dir, tmp_path_factory):
  """A workdir as training leaves it, with the weights of `tiny_trained`."""
  path = str(tmp_path_factory.mktemp('run'))
  config = smoke.get_config()
  config.data.data_dir = data_dir
  config.model.base = config.model.predictor = _NETWORK
  class_names = tuple('0123456789')
  workdir.begin(path, config, class_names)
  trained = tiny_trained(
    num_classes=10, resolutions=(16, 32, 64), predictor_px=16
  )
  with Checkpoints(path, 'finetune', keep=1) as checkpoints:
    checkpoints.save_weights(7, trained.params, trained.batch_stats)
  return path
