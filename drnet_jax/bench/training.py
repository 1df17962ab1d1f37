# SPDX-License-Identifier: Apache-2.0
"""Times training steps; the command `benchmark_training` tells what and how."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
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
from drnet_jax.run import workdir
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.pretrain import PretrainStep
from drnet_jax.steps.routed import REFRESHED, RoutedStep
from drnet_jax.steps.state import Weights

KEY = jax.random.key(0)
_BATCHES = 4  # different ones, so that the shares vary as in training
# Rate 0: the weights, and with them the shares, stay as they are.
_OPTIMIZER = optax.sgd(0.0, momentum=0.9)


class Contender:
  """One kind of step and its state.

  Args:
    name: of the row.
    step_class: the kind of step.
    objective: further fields of the step.
    model: its sizes are those that are trained.
    weights: of the model, or of one with more sizes.
    mesh: devices to run on.
    batch_size: global.

  Attributes:
    same: whether each step draws the noise of the first, so that images choose
      the same sizes again.
    metrics: of each step taken.
  """

  def __init__(
    self,
    name: str,
    step_class: type[PretrainStep | RoutedStep],
    objective: Mapping[str, Any],
    model: DRNet,
    weights: Weights,
    mesh: Mesh,
    batch_size: int,
  ):
    self.name = name
    self._objective = objective
    self._model = model
    self.step = step_class(
      model,
      _OPTIMIZER,
      mesh,
      settings.call(step_class.objective_class, objective, 'objective'),
      batch_size=batch_size,
      steps_per_epoch=1,
    )
    norms = {model.norm_set(r) for r in model.resolutions}
    params, stats = (
      tree | {'norm': {k: v for k, v in tree['norm'].items() if k in norms}}
      for tree in weights
    )
    # A copy, for each step is donated the state and replaces it.
    self.state = jax.jit(
      lambda *weights: jax.tree.map(
        jnp.copy, state_lib.begin(_OPTIMIZER, *weights)
      ),
      out_shardings=mesh_lib.replicated(mesh),
    )(params, stats)
    self.same = False
    self.metrics: list[dict[str, jax.Array]] = []

  def take(self, batch: Mapping[str, jax.Array]) -> None:
    """Takes one step, and waits for it."""
    if self.same:
      step = self.state.step
      again = jax.device_put(np.zeros((), step.dtype), step.sharding)
      self.state = self.state.replace(step=again)
    self.state, metrics = self.step(self.state, batch, KEY)
    jax.block_until_ready((self.state, metrics))
    self.metrics.append(metrics)

  def macs_per_image(self) -> float:
    """What an image of the steps needed on average, forward and backward."""
    macs, objective = self._model.macs(), self._objective
    if isinstance(self.step, PretrainStep):
      return 3.0 * sum(macs.sizes)
    total = 0.0
    for metrics in self.metrics:
      total += 3 * float(metrics['gmacs']) * 1e9  # predictor counted
      if objective['gradient'] == 'all':
        total += objective['explore'] * sum(macs.sizes)
      if objective['statistics'] == 'fresh':
        total += REFRESHED * sum(
          size_macs
          for size_px, size_macs in zip(
            self._model.resolutions, macs.sizes, strict=True
          )
          if metrics[f'share_r{size_px}'] < REFRESHED
        )
    return total / len(self.metrics)


def fixed(model: DRNet, *arguments) -> Contender:
  """An ordinary step at the largest size: the rest as of `Contender`."""
  return Contender(
    f'fixed {model.resolutions[-1]}',
    PretrainStep,
    {'label_smoothing': 0.0, 'distill': 0.0, 'teacher': 'largest'},
    dataclasses.replace(model, resolutions=model.resolutions[-1:]),
    *arguments,
  )


def routed(
  gradient: str, objective: Mapping[str, Any], *arguments
) -> Contender:
  """A step of stage 2 by one gradient of the router: the rest likewise."""
  objective = dict(objective) | {'gradient': gradient}
  return Contender(f'routed, {gradient}', RoutedStep, objective, *arguments)


def time_steps(
  contenders: Sequence[Contender],
  batches: Sequence[Mapping[str, jax.Array]],
  rounds: int,
  rivals: Mapping[str, Callable[[], None]],
) -> list[dict]:
  """Times steps in turn; the first contender is what they are compared with.

  Args:
    contenders: compiled.
    batches: each contender takes them in turn; as many come first, untimed.
    rounds: timed steps of each kind.
    rivals: steps by others that do what the first contender does.

  Returns:
    A row per contender and rival.
  """
  jobs, batch_size = {}, len(batches[0]['label'])
  for c in contenders:
    for batch in batches:
      c.take(batch)
    c.metrics.clear()
    turns = itertools.cycle(batches)
    jobs[c.name] = lambda c=c, turns=turns: c.take(next(turns))
  taken = interleaved(jobs | rivals, rounds, 'steps')
  macs = {c.name: c.macs_per_image() for c in contenders}
  base = contenders[0].name
  rows = []
  for name, seconds in taken.items():
    needed = macs.get(name, macs[base])
    row = {
      'step': name,
      'batch_size': batch_size,
      'images_per_second': batch_size / float(np.median(seconds)),
      'mmacs_per_image': needed / 1e6,
    }
    rows.append(row | speed_up(taken[base], seconds, macs[base] / needed))
  return rows


def benchmark(path: str, *, steps: int, batch_size: int) -> list[dict]:
  """Times fixed and routed steps of a run, with the weights it ended with.

  Args:
    path: workdir of a run with a trained predictor.
    steps: timed steps of each kind.
    batch_size: global, 0 for the run's own.

  Returns:
    A row per kind of step.
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
  data, source = trained.open('train_split')
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
  common = (model, weights, mesh, batch_size)
  contenders = [fixed(*common)] + [
    routed(gradient, stage.objective, *common) for gradient in ('chosen', 'all')
  ]
  for c in contenders:
    c.step.compile(c.state, batches[0])
  return time_steps(contenders, batches, steps, {})
