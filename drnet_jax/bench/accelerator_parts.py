# SPDX-License-Identifier: Apache-2.0
"""The parts of the accelerator suite, from ceilings to a real training.

A part is a function of the suite and of the seconds it has, and yields rows: of
'what', and any measures of it.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from drnet_jax import mesh as mesh_lib
from drnet_jax import models
from drnet_jax.bench import (
  checks,
  cost_model,
  costs,
  rivals,
  subjects,
  trace,
  training,
)
from drnet_jax.bench.stopwatch import interleaved, speed_up
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.export.contract import Contract
from drnet_jax.export.programs import programs
from drnet_jax.models.drnet import DRNet
from drnet_jax.report import evaluated
from drnet_jax.run import evaluate, train, workdir
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.xla import XlaEngine

ORIGINS = ('from scratch', 'from weights')  # part g's runs
# Parts that are named elsewhere, too.
_CEILINGS, _STEPS, TRAINING = 'a ceilings', 'c steps', 'g training'
_CEILING = 'matrix product, TFLOP/s'
_NETWORK, _CLASSES = 'resnet50', 1000
_SHARES = (0.3, 0.45, 0.25)  # of images at each size
_BUCKET_GROWTH = 1.125  # as in configs/in1k.py
# Assumed, of a training: compiling, opening data, the report after.
_START_S = 45
# Images a second that the input of a training reaches at least.
_IMAGES_PER_CORE = 200
_BATCH, _SMALL_BATCH = 256, 16  # images of a step, first of all
_BULK, _IMAGES = 128, 4096  # of a batch at inference, and in all
# How XLA searches for the fastest kernels of a GPU.
_TUNERS = {
  'as XLA does by itself': {'xla_gpu_autotune_level': 4},
  'tuned without checks': {'xla_gpu_autotune_level': 1},
  'nothing is tuned': {'xla_gpu_autotune_level': 0},
}
_SMALL_NETWORK = {
  'network': 'resnet',
  'stage_sizes': (1,),
  'width': 8,
  'stem': 'patch',
}
_SMALL_RUN = {
  'eval_batch_size': 16,
  'data.epoch_images': 32,
  'data.held_out': 8,
  'data.resize_px': 36,
  'data.threads': 1,
  'model.predictor_px': 16,
  'model.image_px': 32,
  'model.resolutions': (16, 32),
  'pretrain.epochs': 1.0,
  'pretrain.batch_size': 16,
  'pretrain.schedule.warmup_epochs': 0.0,
  'finetune.epochs': 1.0,
  'finetune.batch_size': 16,
  'finetune.schedule.warmup_epochs': 0.0,
  'finetune.objective.gradient': 'chosen',
  'finetune.objective.bucket_growth': 8.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """What is asked, and what was found."""

  out: str  # folder for csv, page and runs
  seconds: float  # for all parts together
  small: bool  # a tiny version of each part, for want of an accelerator
  config: ml_collections.ConfigDict  # of part g; data.data_dir a packed file
  # Of a second training, from weights; None for none.
  finetune: ml_collections.ConfigDict | None = None
  parts: str = 'abcdefghi'  # by their letters
  # Steps of kinds, by these and their batches.
  compiled: dict[tuple[str, int], training.Contender] = dataclasses.field(
    default_factory=dict
  )
  # Rows so far, by part.
  found: dict[str, list[dict]] = dataclasses.field(default_factory=dict)


def short(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]


def ceilings(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part a: versions, and what no program can go beyond."""
  for package in ('jax', 'jaxlib', 'flax', 'torch'):
    found = importlib.util.find_spec(package)
    version = importlib.metadata.version(package) if found else 'none'
    yield {'what': package, 'value': version}
  yield {'what': 'device', 'value': mesh_lib.describe()}
  memory = jax.devices()[0].memory_stats() or {}
  yield {'what': 'memory, GB', 'value': memory.get('bytes_limit', 0) / 1e9}
  side, megabytes, rounds = (256, 8, 3) if suite.small else (8192, 1024, 20)
  # Of ones a product is faster.
  square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
  long = jnp.ones(megabytes * 2**18, jnp.float32)
  product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
  jobs = {
    'product': lambda: product(square, square).block_until_ready(),
    'copy': lambda: copy(long).block_until_ready(),
  }
  taken = interleaved(jobs, rounds, 'ceilings')
  product_s, copy_s = (float(np.median(taken[k])) for k in jobs)
  yield {'what': _CEILING, 'value': 2e-12 * side**3 / product_s}
  yield {'what': 'copy, GB/s', 'value': 2e-9 * long.nbytes / copy_s}


def correctness(suite: Suite, left_s: float) -> Iterable[dict]:
  """Part b: is what the device computes right?"""
  return checks.all_checks(suite.small)


def steps(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part c: training steps of ResNet-50 in bfloat16."""
  batch_size = _SMALL_BATCH if suite.small else _BATCH
  yield from _step_rows(suite, batch_size, ('fixed', 'chosen'))


def more_steps(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part h: other steps, and other batches, that take long to compile."""
  if suite.small:
    return
  # Of the first kind there is a row already.
  yield from _step_rows(suite, _BATCH, ('fixed', 'all', 'pretrain'), 1)
  for batch_size in (128, 64, 512):
    try:
      yield from _step_rows(suite, batch_size, ('fixed', 'chosen'))
    except RuntimeError as error:  # as a rule, out of memory
      yield {'what': f'{batch_size} images', 'failed': short(error)}


def _step_rows(
  suite: Suite, batch_size: int, kinds: Sequence[str], start: int = 0
) -> Iterator[dict]:
  """Rows of `training.time_steps`, from that of contender `start` on."""
  batch = _batch(suite.small, batch_size)
  contenders = _compiled(suite, batch_size, kinds)
  rounds = 2 if suite.small else 10
  rows = training.time_steps(contenders, [batch], rounds, {})
  ceiling = next(
    (
      row['value']
      for row in suite.found.get(_CEILINGS, ())
      if row['what'] == _CEILING
    ),
    math.nan,
  )
  for row, contender in list(zip(rows, contenders, strict=True))[start:]:
    flops = 2e6 * row['mmacs_per_image'] * row['images_per_second']
    yield _named(row) | {
      'of_ceiling': flops / 1e12 / ceiling,
      'compile_seconds': contender.compile_seconds,
      'programs_cached': contender.cached,
    }


def _named(row: dict) -> dict:
  """A row of `training.time_steps` by its step and batch."""
  return {'what': f'{row.pop("step")}, {row.pop("batch_size")} images'} | row


def _compiled(
  suite: Suite, batch_size: int, kinds: Sequence[str]
) -> list[training.Contender]:
  """Steps of some kinds, compiled once for all parts."""
  for kind in kinds:
    if (kind, batch_size) not in suite.compiled:
      contender = _contender(suite, batch_size, kind)
      contender.compile(_batch(suite.small, batch_size), same=True)
      suite.compiled[kind, batch_size] = contender
  return [suite.compiled[kind, batch_size] for kind in kinds]


def _contender(suite: Suite, batch_size: int, kind: str) -> training.Contender:
  """A step of some kind, not compiled yet."""
  stage = suite.config['pretrain' if kind == 'pretrain' else 'finetune']
  objective = dict(stage.objective)
  if kind != 'pretrain':  # the buckets of this batch alone are compiled
    objective['bucket_growth'] = _BUCKET_GROWTH
  return training.Contender(
    kind, objective, *_model(suite.small), mesh_lib.create(1), batch_size
  )


@functools.cache
def _batch(small: bool, batch_size: int) -> dict[str, jax.Array]:
  """Noise to train on."""
  model, _ = _model(small)
  batch = {
    'image': costs.noise(model.image_px, batch_size),
    'label': np.arange(batch_size, dtype=np.int32) % 10,
  }
  return mesh_lib.shard_batch(batch, mesh_lib.create(1))


def inference(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part d: whole predictions, in bulk and one at a time."""
  trained, classifier, modes = _served(suite.small)
  subject = subjects.Subject(trained, list(modes['bulk']), shares=_SHARES)
  kinds = {'fixed': _full(classifier)}
  kinds |= subjects.policies_for(subject, classifier)
  jobs = {
    (mode, kind): subjects.Predictions(
      classifier, policy, some, singly=mode == 'single'
    )
    for mode, some in modes.items()
    for kind, policy in kinds.items()
  }
  taken = interleaved(jobs, 1 if suite.small else 5, 'inference')
  for (mode, kind), seconds in taken.items():
    implied = jobs[mode, 'fixed'].gmacs / jobs[mode, kind].gmacs
    yield {
      'what': f'{kind}, {mode}',
      'images_per_second': len(modes[mode]) / float(np.median(seconds)),
    } | speed_up(taken[mode, 'fixed'], seconds, implied)


@functools.cache
def _served(small: bool) -> tuple[workdir.Trained, Classifier, dict]:
  """A model, compiled for inference, and noise by how it is handed in."""
  model, weights = _model(small)
  bulk, count = (4, 8) if small else (_BULK, _IMAGES)
  # Without a margin to cut off: only the network counts.
  trained = subjects.untrained(model, weights, _CLASSES)
  contract = Contract.of(trained)
  made = programs(trained, contract)
  engine = XlaEngine('jax', made, contract, batches=(1, bulk))
  images = costs.noise(model.image_px, count)
  modes = {'bulk': images, 'single': images[:20]}
  return trained, Classifier(contract, engine), modes


def _full(classifier: Classifier) -> policy_lib.Policy:
  return policy_lib.fixed(len(classifier.contract.options) - 1)


def beside_torch(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part f: the same network in PyTorch, beside our fixed size."""
  if suite.small or not rivals.is_offered(_NETWORK):
    return
  if rivals.device() == 'cpu':  # beside a TPU it would take all the time
    return
  (fixed,) = _compiled(suite, _BATCH, ['fixed'])
  steps = training.in_a_row()
  rival = rivals.training_steps(_NETWORK, _CLASSES, _BATCH, steps)
  batch = _batch(suite.small, _BATCH)
  for row in training.time_steps([fixed], [batch], 5, {'PyTorch': rival}):
    yield _named(row)
  del rival
  rivals.free()
  run = rivals.in_torch(_NETWORK, _CLASSES)
  _, classifier, modes = _served(suite.small)
  jobs = {}
  for mode, images in modes.items():
    singly = mode == 'single'
    jobs[mode, 'fixed'] = subjects.Predictions(
      classifier, _full(classifier), images, singly
    )
    jobs[mode, 'PyTorch'] = functools.partial(
      _in_batches, run, images, 1 if singly else _BULK
    )
  taken = interleaved(jobs, 5, 'PyTorch')
  for (mode, name), seconds in taken.items():
    yield {
      'what': f'{name}, {mode}',
      'images_per_second': len(modes[mode]) / float(np.median(seconds)),
    } | speed_up(taken[mode, 'fixed'], seconds, 1.0)


def _in_batches(run, images: np.ndarray, batch: int) -> None:
  for i in range(0, len(images), batch):
    run(images[i : i + batch])


def profile(suite: Suite, left_s: float) -> Iterable[dict]:
  """Part e: the most expensive kernels of a routed step, and its gaps."""
  batch_size = _SMALL_BATCH if suite.small else _BATCH
  (routed,) = _compiled(suite, batch_size, ['chosen'])
  batches = [_batch(suite.small, batch_size)] * training.in_a_row()
  routed.run(batches)
  return trace.profile(lambda: routed.run(batches))


def compiling(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part i: how long one program takes to compile, and how fast it is then."""
  batch_size = _SMALL_BATCH if suite.small else _BATCH
  batch = _batch(suite.small, batch_size)
  for name, options in ({'as it is': {}} if suite.small else _TUNERS).items():
    fixed = _contender(suite, batch_size, 'fixed')
    start = time.perf_counter()
    fixed.compile_by(batch, options)
    seconds = time.perf_counter() - start
    run = functools.partial(fixed.run, [batch])
    taken = interleaved({name: run}, 2, name)
    yield {
      'what': f'{fixed.name}, {batch_size} images, {name}',
      'compile_seconds': seconds,
      'programs_cached': fixed.cached,
      'images_per_second': batch_size / float(np.median(taken[name])),
    }


def real_training(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part g: a run from scratch and one from weights, as long as there is."""
  end = time.perf_counter() + left_s
  asked = dict(zip(ORIGINS, (suite.config, suite.finetune), strict=True))
  asked = {name: config for name, config in asked.items() if config}
  for i, (name, config) in enumerate(asked.items()):
    config = config.copy_and_resolve_references()
    if suite.small:
      config.update_from_flattened_dict(_SMALL_RUN)
      config.model.base = config.model.predictor = _SMALL_NETWORK
    else:
      seconds = (end - time.perf_counter()) / (len(asked) - i)
      _set_epochs(suite, config, seconds - _START_S)
    path = os.path.join(suite.out, name.replace(' ', '_'))
    start = time.perf_counter()
    train.train(config, path)
    epochs = sum(config[stage].epochs for stage in config.stages)
    taken = time.perf_counter() - start
    yield {'what': f'{name}: training', 'epochs': epochs, 'seconds': taken}
    evaluate.evaluate(path)
    for score in evaluated.read(path).scores():
      yield {
        'what': f'{name}: {score.name}',
        'top1': score.top1,
        'gmacs': score.gmacs,
      }


def _set_epochs(suite: Suite, config, seconds: float) -> None:
  """As many epochs as should fit; of two stages the first has two thirds."""
  steps = suite.found.get(_STEPS, ())
  fixed = [row for row in steps if row['what'].startswith('fixed')]
  if not fixed:
    raise RuntimeError('part c timed no fixed step to set epochs by')
  macs_per_second = (
    1e6 * fixed[0]['mmacs_per_image'] * fixed[0]['images_per_second']
  )
  read = train.read(config)
  source = read.data.open(read.data.train_split)
  classes = len(source.class_names)
  macs = models.create(read.model, num_classes=classes).macs()
  shares = {1: (1,), 2: (2 / 3, 1 / 3)}[len(read.stages)]
  for name, share in zip(read.stages, shares, strict=True):
    rate = macs_per_second / cost_model.macs_per_image(read.stages[name], macs)
    rate = min(rate, _IMAGES_PER_CORE * os.cpu_count())
    epochs = max(share * seconds * rate / len(source.examples), 0.2)
    config[name].epochs = epochs
    config[name].schedule.warmup_epochs = min(0.5, epochs / 4)


@functools.cache
def _model(small: bool) -> tuple[DRNet, tuple]:
  """ResNet-50 in bfloat16, and weights whose predictor draws `_SHARES`."""
  base = _SMALL_NETWORK if small else {'network': _NETWORK}
  predictor = _SMALL_NETWORK if small else {'network': 'resnet10'}
  model = subjects.drnet(
    (16, 24, 32) if small else (112, 168, 224),
    base=base | {'dtype': 'bfloat16'},
    predictor=predictor | {'dtype': 'bfloat16'},
    predictor_px=16 if small else 128,
    num_classes=_CLASSES,
  )
  rng = np.random.default_rng(0)

  def drawn(path, x) -> np.ndarray:
    if path[-1].key == 'kernel':
      fan_in = np.float32(math.prod(x.shape[:-1]))
      return rng.standard_normal(x.shape, np.float32) / np.sqrt(fan_in)
    return np.full(x.shape, path[-1].key in ('scale', 'var'), x.dtype)

  # On the host, with nothing to compile.
  params, batch_stats = jax.tree_util.tree_map_with_path(drawn, model.shapes)
  head = params['predictor']['head']
  params['predictor']['head'] = {
    'kernel': np.zeros_like(head['kernel']),
    'bias': np.log(np.array(_SHARES, np.float32)),
  }
  return model, jax.device_put((params, batch_stats))


# By name: seconds at most, and what yields its rows.
PARTS = {
  _CEILINGS: (20, ceilings),
  'b correctness': (60, correctness),
  _STEPS: (150, steps),
  'd inference': (120, inference),
  'e profile': (40, profile),
  'f beside PyTorch': (120, beside_torch),
  TRAINING: (180, real_training),
  'h more steps': (300, more_steps),
  'i compiling': (120, compiling),
}
