# SPDX-License-Identifier: Apache-2.0
"""Times training steps; the command `benchmark_training` tells what and how."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import settings
from drnet_jax.bench.stopwatch import interleaved, speed_up
from drnet_jax.errors import UserError
from drnet_jax.models.drnet import DRNet
from drnet_jax.run import paths, workdir
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.pretrain import PretrainStep
from drnet_jax.steps.routed import RoutedStep
from drnet_jax.steps.routed_objective import REFRESHED
from drnet_jax.steps.state import Weights

_KEY = jax.random.key(0)
_IN_A_ROW = 4  # on an accelerator, which is idle while the host waits for it
_BATCHES = 4  # different ones, so that the shares vary as in training
# Rate 0: the weights, and with them the shares, stay as they are.
_OPTIMIZER = optax.sgd(0.0, momentum=0.9)
_FIXED = {'label_smoothing': 0.0, 'distill': 0.0, 'teacher': 'largest'}


class Contender:
  """One kind of step and its state.

  Args:
    kind: 'fixed', an ordinary step at the largest size; 'pretrain', one of
      stage 1; 'chosen' or 'all', one of stage 2 by that gradient of the router.
    objective: of a stage of that kind; 'fixed' has its own.
    model, weights: of several sizes.
    mesh: devices to run on.
    batch_size: global.
  """

  def __init__(
    self,
    kind: str,
    objective: Mapping[str, Any],
    model: DRNet,
    weights: Weights,
    mesh: Mesh,
    batch_size: int,
  ):
    self.name, step_class, objective = kind, PretrainStep, dict(objective)
    if kind == 'fixed':
      self.name = f'fixed {model.resolutions[-1]}'
      model = dataclasses.replace(model, resolutions=model.resolutions[-1:])
      objective = _FIXED
    elif kind != 'pretrain':
      self.name, step_class = f'routed, {kind}', RoutedStep
      objective['gradient'] = kind
    self._model = model
    self._objective = settings.call(
      step_class.objective_class, objective, 'objective'
    )
    self._step = step_class(
      model,
      _OPTIMIZER,
      mesh,
      self._objective,
      batch_size=batch_size,
      steps_per_epoch=1,
    )
    norms = {model.norm_set(r) for r in model.resolutions}
    params, stats = (
      tree | {'norm': {k: v for k, v in tree['norm'].items() if k in norms}}
      for tree in weights
    )
    # A copy, for each step is donated the state and replaces it.
    self._state = jax.jit(
      lambda *weights: jax.tree.map(
        jnp.copy, state_lib.begin(_OPTIMIZER, *weights)
      ),
      out_shardings=mesh_lib.replicated(mesh),
    )(params, stats)
    self._same = False
    self.compile_seconds, self.cached = 0.0, 0  # programs found in the cache
    self.metrics: list[dict[str, jax.Array]] = []  # of each step taken

  def compile(
    self, batch: Mapping[str, jax.Array], *, same: bool = False
  ) -> None:
    """Compiles the step.

    With `same` a routed step always draws the noise of the first: the images
    choose the same sizes again, whose buckets alone are compiled.
    """
    self._same = same and isinstance(self._step, RoutedStep)
    start = time.perf_counter()
    key = [_KEY] if self._same else []
    self.cached = self._step.compile(self._state, batch, *key)
    self.compile_seconds = time.perf_counter() - start

  def compile_by(
    self, batch: Mapping[str, jax.Array], options: dict[str, Any]
  ) -> None:
    """Compiles a step that is not routed, by options of XLA."""
    self.cached = self._step.compile(self._state, batch, options)

  def run(self, batches: Iterable[Mapping[str, jax.Array]]) -> None:
    """Takes a step with each batch, then waits for them."""
    for batch in batches:
      if self._same:
        step = self._state.step
        again = jax.device_put(np.zeros((), step.dtype), step.sharding)
        self._state = self._state.replace(step=again)
      self._state, metrics = self._step(self._state, batch, _KEY)
      self.metrics.append(metrics)
    jax.block_until_ready(self._state)

  def macs_per_image(self) -> float:
    """What an image of the steps needed on average, forward and backward."""
    macs, objective = self._model.macs(), self._objective
    if isinstance(self._step, PretrainStep):
      return 3.0 * sum(macs.sizes)
    total = 0.0
    for metrics in self.metrics:
      total += 3 * float(metrics['gmacs']) * 1e9  # predictor counted
      if objective.gradient == 'all':
        total += objective.explore * sum(macs.sizes)
      if objective.statistics == 'fresh':
        of_size = zip(self._model.resolutions, macs.sizes, strict=True)
        total += REFRESHED * sum(
          size_macs
          for size_px, size_macs in of_size
          if metrics[f'share_r{size_px}'] < REFRESHED
        )
    return total / len(self.metrics)


def in_a_row() -> int:
  """Steps that are timed together: a training does not wait for each."""
  return 1 if jax.default_backend() == 'cpu' else _IN_A_ROW


def time_steps(
  contenders: Sequence[Contender],
  batches: Sequence[Mapping[str, jax.Array]],
  rounds: int,
  rivals: Mapping[str, Callable[[], None]],
) -> list[dict]:
  """Times steps in turn: a row per contender (compiled) and rival.

  They are compared with the first contender, whose work rivals do as well, as
  many steps in a row (`in_a_row`) as ours before they are waited for. Each
  contender takes the batches in turn; once through them comes first, untimed.
  """
  jobs, images = {}, in_a_row() * len(batches[0]['label'])
  for c in contenders:
    c.run(batches)
    c.metrics.clear()
    turns = itertools.cycle(batches)
    jobs[c.name] = lambda c=c, turns=turns: c.run(
      itertools.islice(turns, in_a_row())
    )
  taken = interleaved(jobs | rivals, rounds, 'steps')
  macs = {c.name: c.macs_per_image() for c in contenders}
  base = contenders[0].name
  rows = []
  for name, seconds in taken.items():
    needed = macs.get(name, macs[base])
    row = {
      'step': name,
      'batch_size': len(batches[0]['label']),
      'images_per_second': images / float(np.median(seconds)),
      'mmacs_per_image': needed / 1e6,
    }
    rows.append(row | speed_up(taken[base], seconds, macs[base] / needed))
  return rows


def benchmark(path: str, *, steps: int, batch_size: int) -> list[dict]:
  """Times steps of a workdir, with the weights it ended with: a row per kind.

  `batch_size` is global, 0 for the run's own.

  Raises:
    UserError: nothing is routed there, or the predictor is not trained yet.
  """
  mesh = mesh_lib.create()
  trained = workdir.load(path, mesh)
  if not isinstance(trained.model, DRNet):
    raise UserError(f'{path} holds a RANet: nothing is routed in its training')
  if not trained.has_router:
    raise UserError(f'{path}: its predictor is not trained yet')
  config, model = trained.config, trained.model
  stage_name = next(n for n in config.stages if config[n].step == 'routed')
  stage = config[stage_name]
  batch_size = batch_size or stage.batch_size // stage.accumulate
  mesh_lib.check_batch(batch_size, mesh, '--batch_size')
  data, source = workdir.open_split(
    paths.root(path), config, config.data.train_split, trained.class_names
  )
  stream = data.train_batches(
    source,
    size_px=model.image_px,
    batch_size=batch_size,
    seed=config.seed,
    start_step=0,
  )
  with contextlib.closing(stream):  # its threads would run on beside the steps
    batches = [
      mesh_lib.shard_batch({k: b[k] for k in ('image', 'label')}, mesh)
      for b in itertools.islice(stream, _BATCHES)
    ]
  weights = trained.params, trained.batch_stats
  contenders = [
    Contender(kind, stage.objective, model, weights, mesh, batch_size)
    for kind in ('fixed', 'chosen', 'all')
  ]
  for c in contenders:
    c.compile(batches[0])
  return time_steps(contenders, batches, steps, {})
