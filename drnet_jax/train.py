# SPDX-License-Identifier: Apache-2.0
"""A training run: its stages in order, and the one loop that runs them all.

A stage is data: a kind of step, how long, and with what. Running the same
command on the same workdir takes up the latest checkpoint; randomness and data
depend on the step alone, so the numbers are those of a run never cut off.
"""

import dataclasses
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh
from tqdm import tqdm

from drnet_jax import log, models, optim, settings, workdir
from drnet_jax import mesh as mesh_lib
from drnet_jax import weights as weights_lib
from drnet_jax.checkpoint import Checkpoints
from drnet_jax.data.pipeline import HELD_OUT, Data
from drnet_jax.errors import UserError
from drnet_jax.evaluate import Evaluator
from drnet_jax.models import Model
from drnet_jax.report import policies
from drnet_jax.steps.exits import ExitsStep
from drnet_jax.steps.pretrain import PretrainStep
from drnet_jax.steps.routed import RoutedStep
from drnet_jax.steps.state import TrainState

STEPS = {'pretrain': PretrainStep, 'routed': RoutedStep, 'exits': ExitsStep}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """`config.<name of the stage>`.

  Attributes:
    step: a key of STEPS.
    epochs: length; may be a fraction.
    batch_size: global.
    eval_every_epochs: between validations; 0 for the end only.
    schedule: fields of `optim.schedule`.
    optimizer: fields of `optim.create`.
    objective: further fields of the step.
  """

  step: str
  epochs: float
  batch_size: int
  eval_every_epochs: float
  schedule: Mapping[str, Any]
  optimizer: Mapping[str, Any]
  objective: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """`config` itself.

  Attributes:
    seed: of weights, data order, augmentation and routing noise.
    init_from: workdir or file of PyTorch weights to begin the first stage
      with, see `weights`; '' for none.
    reset_head: begin with a fresh classifier all the same.
    model: see `models.create`.
    data: see `data.pipeline.Data`.
    stages: each stage by name, in order.
    eval_batch_size: images evaluated at a time, over all devices.
    log_every_steps: a row of metrics is the mean of so many steps.
    checkpoint_every_epochs: the end of a stage always has one; 0 for only it.
    keep_checkpoints: how many of a stage to keep.
  """

  seed: int
  init_from: str
  reset_head: bool
  model: Mapping[str, Any]
  data: Mapping[str, Any]
  stages: Mapping[str, Stage]
  eval_batch_size: int
  log_every_steps: int
  checkpoint_every_epochs: float
  keep_checkpoints: int


def due(step: int, every: int, last: int) -> bool:
  """Whether something done every so many steps is done after this one."""
  return step == last or (every > 0 and step % every == 0)


def train(config: ml_collections.ConfigDict, path: str) -> None:
  """Trains what a config describes, from scratch or from where it stopped.

  Args:
    config: see `Run`; the sections named in `config.stages` are `Stage`s.
    path: the workdir.

  Raises:
    UserError: the config, the workdir or the data cannot work, or the loss is
      not finite.
  """
  run = _read(config)
  mesh = mesh_lib.create()
  mesh_lib.check_batch(run.eval_batch_size, mesh, 'config.eval_batch_size')
  data = settings.call(Data, run.data, 'config.data')
  source = data.open(data.train_split)
  model = workdir.create_model(run.model, source.class_names)
  # All stages before the first is run: a mistake in the last shows at once.
  stages = [
    _StageRunner(run, name, mesh, model, data, source) for name in run.stages
  ]
  workdir.begin(path, config, source.class_names)
  if data.held_out:
    workdir.keep_held_out(path, data.open(HELD_OUT).examples.rows)

  begun = [i for i, s in enumerate(stages) if s.begun(path)]
  first = begun[-1] if begun else 0
  weights = None if begun else _initial_weights(run, mesh, model)
  validation = data.open(data.validation_split)
  evaluator = Evaluator(model, mesh)
  for i, stage in enumerate(stages[first:], first):
    later = [s.name for s in stages[i + 1 :]]
    weights = stage.run(path, weights, evaluator, validation, later)


def _read(config: ml_collections.ConfigDict) -> Run:
  """Checks the fields of a config and of its stages."""
  sections = dict(config)
  names = sections.pop('stages', ())
  if not names:
    raise UserError('config.stages is missing or empty; name at least one')
  # A stage may be defined and left out: its section is known by its step.
  defined = {
    name: settings.call(Stage, section, f'config.{name}')
    for name, section in sections.items()
    if isinstance(section, Mapping | ml_collections.ConfigDict)
    and (name in names or 'step' in section)
  }
  for name in names:
    if name not in defined:
      raise UserError(f'config.stages names {name!r}; config.{name} is missing')
    if defined[name].step not in STEPS:
      raise UserError(
        f'config.{name}.step = {defined[name].step!r} is not one of '
        f'{sorted(STEPS)}'
      )
  others = {k: v for k, v in sections.items() if k not in defined}
  stages = {name: defined[name] for name in names}
  return settings.call(Run, others, 'config', stages=stages)


def _initial_weights(run: Run, mesh: Mesh, model: Model):
  """(params, batch_stats) to begin the first stage with."""
  weights = jax.device_put(
    models.initial_weights(model, jax.random.key(run.seed)),
    mesh_lib.replicated(mesh),
  )
  if run.init_from:
    return weights_lib.load(
      run.init_from, model, weights, mesh, reset_head=run.reset_head
    )
  logging.info('\n%s', parameter_overview.get_parameter_overview(weights[0]))
  return weights


class _StageRunner:
  """One stage of a run, checked and ready."""

  def __init__(
    self,
    run: Run,
    name: str,
    mesh: Mesh,
    model: Model,
    data: Data,
    source,
  ):
    self.name = name
    self._run = run
    self._stage = stage = run.stages[name]
    self._mesh = mesh
    self._model = model
    self._data = data
    self._source = source
    where = f'config.{name}'
    mesh_lib.check_batch(stage.batch_size, mesh, f'{where}.batch_size')
    self._steps_per_epoch = data.steps_per_epoch(source, stage.batch_size)
    self._last = self._in_steps(stage.epochs)
    if self._last < 1:
      raise UserError(f'{where}.epochs = {stage.epochs} is less than one step')
    step_class = STEPS[stage.step]
    if not isinstance(model, step_class.model_class):
      raise UserError(
        f'{where}.step = {stage.step!r} trains a '
        f'{step_class.model_class.__name__}, config.model makes a '
        f'{type(model).__name__}'
      )
    self._has_router = 'predictor' in step_class.trains
    self._rate = settings.call(
      optim.schedule,
      stage.schedule,
      f'{where}.schedule',
      epochs=stage.epochs,
      steps_per_epoch=self._steps_per_epoch,
    )
    self._optimizer = settings.call(
      optim.create,
      stage.optimizer,
      f'{where}.optimizer',
      lr=self._rate,
      trains=step_class.trains,
    )
    self._step = settings.call(
      step_class,
      stage.objective,
      f'{where}.objective',
      model,
      self._optimizer,
      mesh,
      batch_size=stage.batch_size,
      steps_per_epoch=self._steps_per_epoch,
    )

  def begun(self, path: str) -> bool:
    """Whether the workdir holds a checkpoint of this stage."""
    with self._checkpoints(path) as checkpoints:
      return checkpoints.latest_step() is not None

  def run(self, path, weights, evaluator, validation, later: list[str]):
    """Runs the stage, or what is left of it.

    Args:
      path: the workdir.
      weights: (params, batch_stats) to begin with, unless already begun.
      evaluator: of the model.
      validation: source to watch.
      later: names of the stages to come.

    Returns:
      (params, batch_stats) at its end.
    """
    with self._checkpoints(path) as checkpoints:
      state = self._first_state(checkpoints, weights)
      start = int(state.step)
      if start < self._last:
        writer = log.MetricWriter(path, self.name, start, later)
        try:
          state = self._loop(
            state, start, checkpoints, writer, evaluator, validation
          )
        finally:
          writer.close()
    return state.params, state.batch_stats

  def _loop(self, state, start, checkpoints, writer, evaluator, validation):
    run, stage = self._run, self._stage
    # By name, not by place: a stage run alone, from another run's weights, is
    # the same as in one go.
    stage_id = zlib.crc32(self.name.encode()) % 2**20
    batches = self._data.train_batches(
      self._source,
      size_px=self._model.image_px,
      batch_size=stage.batch_size,
      seed=run.seed + stage_id,
      start_step=start,
    )
    key = jax.random.fold_in(jax.random.key(run.seed), stage_id)
    eval_every = self._in_steps(stage.eval_every_epochs)
    save_every = self._in_steps(run.checkpoint_every_epochs)
    pending, epoch_shares = [], []
    batch = mesh_lib.shard_batch(_for_training(next(batches)), self._mesh)
    self._step.compile(state, batch)
    clock = time.perf_counter()
    with tqdm(
      total=self._last * stage.batch_size,
      initial=start * stage.batch_size,
      desc=self.name,
      unit='img',
      unit_scale=True,
      disable=None,
    ) as bar:
      for step in range(start + 1, self._last + 1):
        state, metrics = self._step(state, batch, key)
        pending.append((step, metrics))
        if step < self._last:
          # Made and sent while the device is at work on this step.
          batch = mesh_lib.shard_batch(_for_training(next(batches)), self._mesh)
        bar.update(stage.batch_size)

        saves = due(step, save_every, self._last)
        evaluates = due(step, eval_every, self._last)
        # A row ends wherever a run may be taken up again, so that rows do not
        # depend on where it was cut off.
        if saves or due(step, run.log_every_steps, self._last):
          means = self._finite_means(pending, checkpoints)
          images = len(pending) * stage.batch_size
          now = time.perf_counter()
          rates = {'images_per_second': images / (now - clock)}
          clock, pending = now, []
          means['learning_rate'] = float(self._rate(step - 1))
          writer.write(step, {f'train/{k}': v for k, v in means.items()}, rates)
          bar.set_postfix_str(f'loss {means["loss"]:.3f}', refresh=False)
          epoch_shares.append(
            {k: v for k, v in means.items() if k.startswith('share_')}
          )
        if step % self._steps_per_epoch == 0:
          self._warn_of_collapse(step, epoch_shares)
          epoch_shares = []
        if saves:
          self._check_weights(step, state, checkpoints)
          checkpoints.save(step, state)
        if evaluates:
          record = evaluator(
            state.params,
            state.batch_stats,
            self._data.eval_batches(
              validation,
              size_px=self._model.image_px,
              batch_size=run.eval_batch_size,
            ),
            len(validation.examples),
            'validate',
            has_router=self._has_router,
          )
          self._report(step, record, writer, means)
          clock = time.perf_counter()
    return state

  def _report(self, step, record, writer, means) -> None:
    """Writes a validation, and prints it as one line."""
    epoch = step / self._steps_per_epoch
    parts = [
      f'{self.name}  epoch {epoch:.4g}/{self._stage.epochs:g}',
      f'loss {means["loss"]:.3f}',
    ]
    metrics = {}
    for policy in policies.fixed(record):
      metrics[f'{policy.name.replace(" ", "_")}_top1'] = policy.top1
      parts.append(f'{policy.name}: {policy.top1:.1%}')
    if self._has_router:
      router = policies.routed(record)
      rival = policies.best_fixed(record, router.gmacs)
      metrics |= {
        'routed_top1': router.top1,
        'routed_gmacs': router.gmacs,
        'best_fixed_top1': rival.top1,
      }
      shares = ' '.join(
        f'{option} {share:.0%}'
        for option, share in zip(record.options, router.shares, strict=True)
      )
      cost = router.gmacs / record.gmacs.max()
      parts.append(
        f'routed: {router.top1:.1%} at {cost:.0%} of the full cost '
        f'(best fixed there: {rival.top1:.1%}; {shares})'
      )
    writer.write(step, {f'validation/{k}': v for k, v in metrics.items()})
    log.say('  '.join(parts))

  def _first_state(self, checkpoints: Checkpoints, weights) -> TrainState:
    """The latest checkpoint, or the stage's beginning from `weights`."""
    replicated = mesh_lib.replicated(self._mesh)

    def begin(params, batch_stats):
      return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=self._optimizer.init(params),
      )

    step = checkpoints.latest_step()
    if step is None:
      return jax.jit(begin, out_shardings=replicated)(*weights)
    abstract = jax.eval_shape(
      lambda key: begin(*self._model.init(key)), jax.random.key(0)
    )
    log.say(f'{self.name}: going on from step {step} of {self._last}')
    return checkpoints.restore(step, abstract, replicated)

  def _finite_means(self, pending, checkpoints) -> dict[str, float]:
    """Means of the metrics of several steps; UserError if a loss is not one."""
    fetched = jax.device_get([metrics for _, metrics in pending])
    for (step, _), metrics in zip(pending, fetched, strict=True):
      if not np.isfinite(metrics['loss']):
        self._stop(f'the loss of step {step} is {metrics["loss"]}', checkpoints)
    return {k: float(np.mean([m[k] for m in fetched])) for k in fetched[0]}

  def _check_weights(self, step, state, checkpoints) -> None:
    """UserError if the weights, whatever the loss before, hold a NaN."""
    if not _all_finite((state.params, state.batch_stats)):
      self._stop(f'the weights after step {step} are not finite', checkpoints)

  def _stop(self, what: str, checkpoints: Checkpoints) -> None:
    step = checkpoints.latest_step()
    good = 'none was saved yet' if step is None else f'step {step} is kept'
    raise UserError(
      f'stage {self.name}: {what}. The last good checkpoint: {good}. Lower '
      f'config.{self.name}.schedule.lr, or set '
      f'config.{self.name}.optimizer.clip_norm.'
    )

  def _warn_of_collapse(self, step, epoch_shares) -> None:
    for name in epoch_shares[0] if epoch_shares else ():
      share = np.mean([shares[name] for shares in epoch_shares])
      if share > 0.95:
        log.say(
          f'warning: {self.name}, epoch {step // self._steps_per_epoch}: '
          f'{name} is {share:.0%}; the predictor has collapsed onto one size. '
          f"Try config.{self.name}.objective.gradient = 'all', a slower "
          'eta_warmup_epochs, or another target_gmacs.'
        )

  def _checkpoints(self, path: str) -> Checkpoints:
    return Checkpoints(path, self.name, keep=self._run.keep_checkpoints)

  def _in_steps(self, epochs: float) -> int:
    return round(epochs * self._steps_per_epoch)


def _for_training(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {
    'image': batch['image'],
    'label': batch['label'].astype(np.int32),
  }


@jax.jit
def _all_finite(tree) -> jax.Array:
  return jnp.all(
    jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])
  )
