# SPDX-License-Identifier: Apache-2.0
"""Does routing pay in training? Times steps of a run, side by side.

    python -m drnet_jax benchmark_training --workdir=runs/quick

Takes the weights of a finished run, so the images choose sizes in the shares
the run ended with, and times in turn, on the same batches:

* fixed: an ordinary training step at the largest size, no predictor;
* routed: a step of stage 2, predictor counted, for either router gradient.

The bound of a routed step is what its multiply-adds imply: forward and backward
count three times the forward's, sizes that are only explored or refreshed once.
`realised / implied` is the share of that bound which shows on the stopwatch.
"""

import csv
import dataclasses
import itertools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from drnet_jax import mesh as mesh_lib
from drnet_jax import settings, terminal
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError
from drnet_jax.run import workdir
from drnet_jax.steps import routed
from drnet_jax.steps.pretrain import PretrainStep
from drnet_jax.steps.routed import RoutedStep
from drnet_jax.steps.state import TrainState

_BATCHES = 4  # different ones, so that the shares vary as in training


@dataclasses.dataclass
class Contender:
  """One kind of step, its state, and what it took.

  Attributes:
    name: of the row.
    step: PretrainStep or RoutedStep.
    state: donated to each step and replaced.
    macs: multiply-adds per image that each timed step should need.
    seconds: of each timed step.
  """

  name: str
  step: PretrainStep | RoutedStep
  state: TrainState
  macs: list[float] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)


def benchmark(path: str, *, steps: int, batch_size: int) -> list[dict]:
  """Times the steps; see the module.

  Args:
    path: workdir of a run with a trained predictor.
    steps: timed steps of each kind.
    batch_size: global, 0 for the run's own.

  Returns:
    A row per kind of step.
  """
  mesh = mesh_lib.create()
  trained = workdir.load(path, mesh)
  if not trained.has_router:
    raise UserError(f'{path}: its predictor is not trained yet')
  config, model = trained.config, trained.model
  stage_name = next(n for n in config.stages if config[n].step == 'routed')
  stage = config[stage_name]
  batch_size = batch_size or stage.batch_size
  mesh_lib.check_batch(batch_size, mesh, '--batch_size')
  data = settings.call(Data, config.data, 'config.data')
  stream = data.train_batches(
    data.open(data.train_split),
    size_px=model.image_px,
    batch_size=batch_size,
    seed=config.seed,
    start_step=0,
  )
  batches = [
    mesh_lib.shard_batch({k: b[k] for k in ('image', 'label')}, mesh)
    for b in itertools.islice(stream, _BATCHES)
  ]
  # Rate 0: the weights, and with them the shares, stay those of the run.
  optimizer = optax.sgd(0.0, momentum=0.9)

  def contender(name, model, step_class, objective):
    step = step_class(
      model,
      optimizer,
      mesh,
      settings.call(
        step_class.objective_class,
        objective,
        f'config.{stage_name}.objective',
      ),
      batch_size=batch_size,
      steps_per_epoch=1,
    )
    norms = {model.norm_set(r) for r in model.resolutions}
    only = {k: v for k, v in trained.params['norm'].items() if k in norms}
    kept = {k: v for k, v in trained.batch_stats['norm'].items() if k in norms}
    params = trained.params | {'norm': only}
    state = TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=trained.batch_stats | {'norm': kept},
      opt_state=optimizer.init(params),
    )
    copy = jax.jit(
      lambda x: jax.tree.map(jnp.copy, x),
      out_shardings=mesh_lib.replicated(mesh),
    )
    return Contender(name, step, copy(state))

  largest = dataclasses.replace(model, resolutions=model.resolutions[-1:])
  smoothing = {
    'label_smoothing': stage.objective.label_smoothing,
    'distill': 0.0,  # there is one size
    'teacher': 'largest',
  }
  objective = dict(stage.objective)
  contenders = [
    contender(f'fixed {model.image_px}', largest, PretrainStep, smoothing)
  ] + [
    contender(
      f'routed, {gradient}',
      model,
      RoutedStep,
      objective | {'gradient': gradient},
    )
    for gradient in ('chosen', 'all')
  ]

  macs = model.macs()
  key = jax.random.key(0)
  for c in tqdm(contenders, 'compile', leave=False, disable=None):
    c.step.compile(c.state, batches[0])
    for batch in batches:
      _timed(c, batch, key)
  for turn in tqdm(range(steps), 'time', leave=False, disable=None):
    # In turn, so that a machine that changes its speed does so for all.
    for c in contenders:
      seconds, metrics = _timed(c, batches[turn % _BATCHES], key)
      c.seconds.append(seconds)
      c.macs.append(
        _macs_per_image(c, metrics, model.resolutions, macs, objective)
      )

  base = contenders[0]
  rows = []
  for c in contenders:
    realised = float(np.median(np.divide(base.seconds, c.seconds)))
    implied = float(np.mean(base.macs) / np.mean(c.macs))
    rows.append(
      {
        'step': c.name,
        'batch_size': batch_size,
        'images_per_second': batch_size / float(np.median(c.seconds)),
        'mmacs_per_image': float(np.mean(c.macs)) / 1e6,
        'implied': implied,
        'realised': realised,
        'realised_of_implied': realised / implied,
      }
    )
  return rows


def _timed(contender: Contender, batch, key):
  """Takes one step; (seconds, its metrics)."""
  jax.block_until_ready(contender.state)
  start = time.perf_counter()
  contender.state, metrics = contender.step(contender.state, batch, key)
  jax.block_until_ready((contender.state, metrics))
  return time.perf_counter() - start, metrics


def _macs_per_image(contender, metrics, resolutions, macs, objective) -> float:
  """What one image of this step needs, forward and backward."""
  if 'gmacs' not in metrics:
    return 3 * macs.sizes[-1]
  total = 3 * float(metrics['gmacs']) * 1e9
  if contender.name.endswith('all'):
    total += objective['explore'] * sum(macs.sizes)
  if objective['statistics'] == 'fresh':
    total += routed.REFRESHED * sum(
      size_macs
      for size_px, size_macs in zip(resolutions, macs.sizes, strict=True)
      if metrics[f'share_r{size_px}'] < routed.REFRESHED
    )
  return total


def run(path: str, *, steps: int, batch_size: int) -> None:
  """Times the steps, prints a table and leaves it in the report."""
  rows = benchmark(path, steps=steps, batch_size=batch_size)
  device = jax.devices()[0].device_kind
  print(f'{jax.device_count()} x {device}, {os.cpu_count()} processor cores')
  print(
    terminal.table(
      [
        {
          'training step': row['step'],
          'images/s': f'{row["images_per_second"]:.0f}',
          'MMACs/image': f'{row["mmacs_per_image"]:.1f}',
          'implied': f'{row["implied"]:.2f} x',
          'realised': f'{row["realised"]:.2f} x',
          'realised / implied': f'{row["realised_of_implied"]:.2f}',
        }
        for row in rows
      ]
    )
  )
  path = os.path.join(path, 'report', 'training_step.csv')
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  print(f'Written: {path}')
