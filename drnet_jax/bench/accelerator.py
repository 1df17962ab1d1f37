# SPDX-License-Identifier: Apache-2.0
"""Measures an accelerator: ceilings, correctness, steps, inference, training.

Each part yields rows, which are in the csv file before the next is measured. A
part that fails, or is out of time, is noted there, and the next one begins.
Rows of parts that are not asked for stay as an earlier run left them.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from drnet_jax import mesh as mesh_lib
from drnet_jax import models, tables
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
from drnet_jax.errors import UserError
from drnet_jax.models.drnet import DRNet
from drnet_jax.report import evaluated, page
from drnet_jax.report.page import Page, Section, Table
from drnet_jax.report.wording import Answer
from drnet_jax.run import evaluate, train
from drnet_jax.serve.classifier import Classifier

FILE = 'accelerator.csv'
COLUMNS = ('part', 'what', 'measure', 'value')
ORIGINS = ('from scratch', 'from weights')  # part g's runs
# Parts that are named elsewhere, too.
_CEILINGS, _STEPS, _TRAINING = 'a ceilings', 'c steps', 'g training'
_CEILING = 'matrix product, TFLOP/s'
_NETWORK, _CLASSES = 'resnet50', 1000
_SHARES = (0.3, 0.45, 0.25)  # of images at each size
_BUCKET_GROWTH = 1.125  # as in configs/in1k.py
# Assumed, of a training: compiling, opening data, the report after.
_START_S = 45
# Images a second that the input of a training reaches at least.
_IMAGES_PER_CORE = 200
# Ways to spare XLA the search for the fastest kernels on a GPU.
_TUNERS = {
  'all is tuned': {'xla_gpu_autotune_level': 4},
  'fusions are not tuned': {
    'xla_gpu_autotune_level': 4,
    'xla_gpu_experimental_enable_fusion_autotuner': False,
  },
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
  parts: str = 'abcdefg'  # by their letters
  # Rows so far, by part.
  found: dict[str, list[dict]] = dataclasses.field(default_factory=dict)


def run(suite: Suite) -> str:
  """Runs all parts; returns the tables as Markdown."""
  os.makedirs(suite.out, exist_ok=True)
  _take_up(suite)
  begin = time.perf_counter()
  for name, (limit_s, part) in PARTS.items():
    if name[0] not in suite.parts:
      continue
    left_s = suite.seconds - (time.perf_counter() - begin)
    if not suite.small:
      left_s = min(left_s, limit_s)
    start, status = time.perf_counter(), 'finished'
    suite.found[name] = []
    if left_s < 1:
      status = 'left out: no time'
    else:
      try:
        with _time_limit(left_s):
          for row in part(suite, left_s):
            _note(suite, name, row)
      except Exception as error:
        status = f'{type(error).__name__}: {_short(error)}'
    took = time.perf_counter() - start
    _note(suite, name, {'what': 'part', 'status': status, 'seconds': took})
  made = _page(suite)
  page.write(made, suite.out)
  return page.markdown(made, suite.out)


def _take_up(suite: Suite) -> None:
  """Keeps what an earlier suite found, but of the parts that are asked for.

  Raises:
    UserError: that was another device's.
  """
  path, kept = os.path.join(suite.out, FILE), []
  if os.path.exists(path):
    with open(path, newline='') as file:
      rows = csv.DictReader(file)
      kept = [row for row in rows if row['part'][0] not in suite.parts]
  if _TRAINING[0] in suite.parts:
    for name in ORIGINS:
      folder = os.path.join(suite.out, name.replace(' ', '_'))
      shutil.rmtree(folder, ignore_errors=True)
  rows = []
  for cell in kept:
    part, what, key = cell['part'], cell['what'], cell['measure']
    last = rows[-1] if rows else ('', {})
    # A row that has the measure already is followed by one of the same name.
    if (part, what) != (last[0], last[1].get('what')) or key in last[1]:
      rows.append((part, {'what': what}))
    rows[-1][1][key] = _as_number(cell['value'])
  here = mesh_lib.describe()
  for part, row in rows:
    if row['what'] == 'device' and 'value' in row and row['value'] != here:
      raise UserError(
        f'{path} is of {row["value"]}, and this is {here}: name another folder'
      )
    suite.found.setdefault(part, []).append(row)
  partial = f'{path}.partial'
  with open(partial, 'w', newline='') as file:
    csv.writer(file).writerow(COLUMNS)
    for part, row in rows:
      _append(file, part, row)
  os.replace(partial, path)


def _as_number(text: str) -> float | str:
  try:
    return float(text)
  except ValueError:
    return text


def _note(suite: Suite, part: str, row: dict) -> None:
  suite.found[part].append(row)
  with open(os.path.join(suite.out, FILE), 'a', newline='') as file:
    _append(file, part, row)


def _append(file: TextIO, part: str, row: dict) -> None:
  csv.writer(file).writerows(
    (part, row['what'], k, v) for k, v in row.items() if k != 'what'
  )


def _short(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
  """TimeoutError after so long, as soon as Python has its turn again."""

  def stop(*unused) -> None:
    raise TimeoutError(f'stopped after {seconds:.0f} s')

  before = signal.signal(signal.SIGALRM, stop)
  others = signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    # Another's alarm, say that of a test, is only put off.
    signal.setitimer(signal.ITIMER_REAL, *others)
    signal.signal(signal.SIGALRM, before)


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
  ceiling = next(
    (
      row['value']
      for row in suite.found.get(_CEILINGS, ())
      if row['what'] == _CEILING
    ),
    math.nan,
  )
  kinds = ('fixed', 'pretrain', 'chosen', 'all')
  if suite.small:
    kinds = kinds[::2]
  for batch_size in (16,) if suite.small else (256, 128, 64, 512):
    try:
      for row in _step_rows(suite, batch_size, kinds):
        flops = 2e6 * row['mmacs_per_image'] * row['images_per_second']
        what = f'{row.pop("step")}, {row.pop("batch_size")} images'
        share = {'of_ceiling': flops / 1e12 / ceiling}
        yield {'what': what} | row | share
    except RuntimeError as error:  # as a rule, out of memory
      yield {'what': f'{batch_size} images', 'failed': _short(error)}


def _step_rows(
  suite: Suite, batch_size: int, kinds: Sequence[str]
) -> Iterator[dict]:
  """Rows of `training.time_steps`, ours first: PyTorch compiles for long."""
  rounds = 2 if suite.small else 10
  contenders, batch = _contenders(suite, batch_size, kinds)
  for c in contenders:
    c.compile(batch, same=True)
  yield from training.time_steps(contenders, [batch], rounds, {})
  # For larger batches of both frameworks there is no memory.
  if _has_rival(suite) and batch_size <= 256:
    del contenders[1:]
    rival = rivals.training_step(_NETWORK, _CLASSES, batch_size)
    others = {'PyTorch': rival}
    yield training.time_steps(contenders, [batch], rounds, others)[-1]
    del rival, others
    rivals.free()


def _contenders(suite: Suite, batch_size: int, kinds: Sequence[str]):
  """Steps of some kinds, not compiled yet, and a batch for them."""
  model, weights = _model(suite.small)
  mesh = mesh_lib.create(1)
  batch = mesh_lib.shard_batch(
    {
      'image': costs.noise(model.image_px, batch_size),
      'label': np.arange(batch_size, dtype=np.int32) % 10,
    },
    mesh,
  )
  contenders = []
  for kind in kinds:
    stage = suite.config['pretrain' if kind == 'pretrain' else 'finetune']
    objective = dict(stage.objective)
    if kind != 'pretrain':  # the buckets of this batch alone are compiled
      objective['bucket_growth'] = _BUCKET_GROWTH
    contenders.append(
      training.Contender(kind, objective, model, weights, mesh, batch_size)
    )
  return contenders, batch


def inference(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part d: whole predictions, in bulk and one at a time."""
  model, weights = _model(suite.small)
  bulk, count, rounds = (4, 8, 1) if suite.small else (128, 2048, 5)
  # Without a margin to cut off: only the network counts.
  trained = subjects.untrained(model, weights, _CLASSES)
  classifier = Classifier.of(trained, runtime='jax', batch=bulk)
  rival = rivals.in_torch(_NETWORK, _CLASSES) if _has_rival(suite) else None
  images = costs.noise(model.image_px, count)
  subject = subjects.Subject(trained, list(images), shares=_SHARES)
  full = policy_lib.fixed(len(model.resolutions) - 1)
  kinds = {'fixed': full} | subjects.policies_for(subject, classifier)
  modes = {'bulk': images, 'single': images[:20]}
  jobs = {}
  for mode, some in modes.items():
    batch = 1 if mode == 'single' else bulk
    for kind, policy in kinds.items():
      jobs[mode, kind] = subjects.Predictions(
        classifier, policy, some, singly=mode == 'single'
      )
    if rival:
      jobs[mode, 'PyTorch'] = functools.partial(_in_batches, rival, some, batch)
  taken = interleaved(jobs, rounds, 'inference')
  for (mode, kind), seconds in taken.items():
    at_most = jobs[mode, 'fixed'].gmacs  # PyTorch's, too
    implied = at_most / getattr(jobs[mode, kind], 'gmacs', at_most)
    yield {
      'what': f'{kind}, {mode}',
      'images_per_second': len(modes[mode]) / float(np.median(seconds)),
    } | speed_up(taken[mode, 'fixed'], seconds, implied)


def _has_rival(suite: Suite) -> bool:
  if suite.small or not rivals.is_offered(_NETWORK):
    return False
  return rivals.device() != 'cpu'  # beside a TPU it would take all the time


def _in_batches(run, images: np.ndarray, batch: int) -> None:
  for i in range(0, len(images), batch):
    run(images[i : i + batch])


def profile(suite: Suite, left_s: float) -> Iterable[dict]:
  """Part e: the most expensive kernels of a routed step, and its gaps."""
  batch_size = 16 if suite.small else 256
  (routed,), batch = _contenders(suite, batch_size, ['chosen'])
  routed.compile(batch, same=True)
  routed.take(batch)
  return trace.profile(lambda: routed.take(batch))


def compiling(suite: Suite, left_s: float) -> Iterator[dict]:
  """Part f: how long one program takes to compile, and how fast it is then."""
  batch_size, times = (16, 2) if suite.small else (256, 10)
  settings = {'as it is': {}} | ({} if suite.small else _TUNERS)
  for name, options in settings.items():
    (fixed,), batch = _contenders(suite, batch_size, ['fixed'])
    start = time.perf_counter()
    fixed.compile_by(batch, options)
    seconds = time.perf_counter() - start
    taken = interleaved({name: lambda c=fixed, b=batch: c.take(b)}, times, name)
    yield {
      'what': f'{fixed.name}, {batch_size} images, {name}',
      'compile_seconds': seconds,
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
  params, batch_stats = jax.jit(model.init)(jax.random.key(0))
  params['predictor']['head'] = {
    'kernel': jnp.zeros_like(params['predictor']['head']['kernel']),
    'bias': jnp.log(jnp.array(_SHARES)),
  }
  return model, (params, batch_stats)


def _page(suite: Suite) -> Page:
  """A table of each part."""
  sections, broken = [], []
  found = {name: suite.found[name] for name in PARTS if name in suite.found}
  for name, rows in found.items():
    *measured, end = rows
    if end['status'] != 'finished':
      broken.append(name)
    blank = dict.fromkeys((k for row in measured for k in row), '')
    cells = [blank | row for row in tables.cells(measured)]
    sections.append(
      Section(
        title=f'{name}: {PARTS[name][1].__doc__.splitlines()[0]}',
        text=[f'{end["status"]}, after {end["seconds"]:.0f} s.'],
        table=Table.of(cells) if cells else None,
      )
    )
  done = len(sections) - len(broken)
  answer = Answer(
    'Did all parts finish?',
    f'{done} of {len(PARTS)}',
    f'Not finished: {", ".join(broken)}.' if broken else 'None is missing.',
  )
  return Page('Accelerator suite', mesh_lib.describe(), [answer], sections)


# By name: seconds at most, and what yields its rows.
PARTS = {
  _CEILINGS: (20, ceilings),
  'b correctness': (75, correctness),
  _STEPS: (150, steps),
  'd inference': (75, inference),
  'e profile': (40, profile),
  'f compiling': (120, compiling),
  _TRAINING: (150, real_training),
}
