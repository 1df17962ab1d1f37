# SPDX-License-Identifier: Apache-2.0
"""One stage of a run, and the one loop that runs stages of every kind.

A stage is data: a kind of step, how long, and with what.
"""

import contextlib
import dataclasses
import functools
import os
import time
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import processes, settings, terminal
from drnet_jax.choosing import policy, scores
from drnet_jax.data.sources import Source
from drnet_jax.errors import NotFinite, UserError
from drnet_jax.models import Model
from drnet_jax.run import log
from drnet_jax.run.checkpoint import Checkpoints
from drnet_jax.steps import optim
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.augment import BatchAugmentation
from drnet_jax.steps.exits import ExitsStep
from drnet_jax.steps.pretrain import PretrainStep
from drnet_jax.steps.routed import RoutedStep

STEPS = {'pretrain': PretrainStep, 'routed': RoutedStep, 'exits': ExitsStep}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """`config.<name of the stage>`.

  Attributes:
    step: a key of STEPS.
    epochs: length; may be a fraction.
    batch_size: images of one update of the weights, over all devices.
    accumulate: steps that share an update: each takes `batch_size / accumulate`
      images, and the update is that of their mean gradient. Batch norms (and
      the router's hinge) see the images of one step only.
    ema_decay: of the running average of weights and batch statistics that is
      evaluated, deployed and handed to the next stage; 0 for the weights as
      they are. It moves once an update; after n of them the decay is at most
      (1 + n) / (10 + n).
    eval_every_epochs: between validations; 0 for the end only.
    schedule: fields of `optim.schedule`.
    optimizer: fields of `optim.create`.
    objective: fields of the `objective_class` of the step.
  """

  step: Literal[*STEPS]
  epochs: Annotated[float, settings.In('(0, 1e6]')]
  batch_size: settings.Natural
  accumulate: settings.Natural
  ema_decay: settings.BelowOne
  eval_every_epochs: settings.Epochs
  schedule: Mapping[str, Any]
  optimizer: Mapping[str, Any]
  objective: Mapping[str, Any]

  def check(self, where: str) -> None:
    """Checks the sections within this one, `where` in the config."""

    def check(name: str, function, *given: str) -> None:
      settings.check(function, getattr(self, name), f'{where}.{name}', *given)

    check('schedule', optim.schedule, 'epochs', 'steps_per_epoch')
    check('optimizer', optim.create, 'lr', 'trains', 'accumulate')
    check('objective', STEPS[self.step].objective_class)


def due(step: int, every: int, last: int) -> bool:
  """Whether something done every so many steps is done after this one."""
  return step == last or (every > 0 and step % every == 0)


class StageRunner:
  """One stage of a run, checked and ready.

  Of the config `run`, a `train.Run`, it is the section `stage`, which has its
  `name`. `source` is the training split.

  Raises:
    UserError: a field that cannot work.
  """

  def __init__(
    self,
    name: str,
    stage: Stage,
    run: Any,
    *,
    mesh: Mesh,
    model: Model,
    source: Source,
  ):
    self.name = name
    self._stage = stage
    self._run = run
    self._source = source
    # By name, not by place: a stage run alone, from another run's weights, is
    # the same as in one go.
    stage_id = zlib.crc32(name.encode()) % 2**20
    self._data_seed = run.seed + stage_id
    self._key = jax.random.fold_in(jax.random.key(run.seed), stage_id)

    data, where = run.data, f'config.{name}'
    if stage.batch_size % stage.accumulate:
      raise UserError(
        f'{where}.batch_size = {stage.batch_size} cannot be divided into '
        f'{where}.accumulate = {stage.accumulate} steps'
      )
    self._step_images = stage.batch_size // stage.accumulate
    field = f'{where}.batch_size'
    if stage.accumulate > 1:
      field += f' / {where}.accumulate'
    mesh_lib.check_batch(self._step_images, mesh, field)
    augmentation = BatchAugmentation(
      flip=data.flip,
      mixup=data.mixup,
      cutmix=data.cutmix,
      unlabelled=bool(data.unlabelled),
      num_classes=len(source.class_names),
    )
    augmentation.check_batch(self._step_images, field)
    self._augment = augmentation.compiled(mesh)
    self._updates_per_epoch = data.steps_per_epoch(source, stage.batch_size)
    self.steps_per_epoch = self._updates_per_epoch * stage.accumulate
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
    # These sections are checked: see `Stage.check`.
    self._rate = optim.schedule(
      **stage.schedule,
      epochs=stage.epochs,
      steps_per_epoch=self._updates_per_epoch,
    )
    optimizer = optim.create(
      **stage.optimizer,
      lr=self._rate,
      trains=step_class.trains,
      accumulate=stage.accumulate,
    )
    objective = step_class.objective_class(**stage.objective)
    if data.unlabelled and not getattr(objective, 'distill', 0):
      raise UserError(
        f'config.data.unlabelled is set, and {name!r} learns from labels: '
        f"{where} needs step = 'pretrain' and objective.distill > 0"
      )
    self._step = step_class(
      model,
      optimizer,
      mesh,
      objective,
      batch_size=self._step_images,
      steps_per_epoch=self.steps_per_epoch,
    )
    self._average = jax.jit(
      functools.partial(
        state_lib.average,
        decay=stage.ema_decay,
        accumulate=stage.accumulate,
      ),
      donate_argnums=0,
      out_shardings=state_lib.weights(self._step.shardings),
    )

  def begun(self, path: str) -> bool:
    """Whether the workdir holds a checkpoint of this stage."""
    if not os.path.isdir(os.path.join(path, 'checkpoints', self.name)):
      return False
    with Checkpoints(path, self.name, keep=None) as checkpoints:
      return checkpoints.latest_step() is not None

  def run(self, path, weights, evaluate, later: list[str]):
    """Runs the stage, or what is left of it.

    Args:
      path: the workdir.
      weights: (params, batch_stats) to begin with, unless already begun.
      evaluate: from (params, batch_stats, has_router=) to a record of the
        validation split.
      later: names of the stages to come.

    Returns:
      (params, batch_stats) at its end, the averaged ones if there are.

    Raises:
      Stopped: SIGTERM or Ctrl-C stopped it; its state is saved.
      UserError: the loss or the weights are not finite.
    """
    keep = self._run.keep_checkpoints
    with Checkpoints(path, self.name, keep=keep) as checkpoints:
      state, average, row = self._first_state(checkpoints, weights)
      start = int(state.step)
      if start < self._last and not processes.should_stop():
        writer = log.MetricWriter(path, self.name, start, later)
        with (
          contextlib.closing(writer),
          contextlib.closing(self.batches(start)) as batches,
        ):
          state, average = self._loop(
            state, average, row, batches, checkpoints, writer, evaluate
          )
    if int(state.step) < self._last:
      raise processes.Stopped(
        f'at step {int(state.step)} of {self._last} of {self.name}; all is '
        'saved. The same command resumes from there.'
      )
    return average or state_lib.weights(state)

  def _loop(self, state, average, row, batches, checkpoints, writer, evaluate):
    """Takes steps to the end, or to SIGTERM; returns (state, average)."""
    start, last = int(state.step), self._last
    eval_every = self._every(self._stage.eval_every_epochs)
    save_every = self._every(self._run.checkpoint_every_epochs)
    batch = next(batches)
    self._step.compile(state, batch)
    processes.wait_for_all('compiled')
    epoch_means = []  # of the rows of this epoch
    timed_from, clock = start, time.perf_counter()
    with terminal.progress(
      total=last * self._step_images,
      initial=start * self._step_images,
      desc=self.name,
      unit='img',
      unit_scale=True,
    ) as bar:
      for step in range(start + 1, last + 1):
        state, metrics = self._step(state, batch, self._key)
        if average is not None:
          average = self._average(average, state)
        # Another list: the one before may be waiting to be written.
        row = [*row, metrics]
        if step < last:
          # Made and sent while the device is at work on this step.
          batch = next(batches)
        bar.update(self._step_images)

        saves = due(step, save_every, last)
        evaluates = due(step, eval_every, last)
        stops = processes.should_stop()
        logs = due(step, self._run.log_every_steps, last)
        if saves or evaluates or logs or stops:
          row = _fetched(row)
          weights = state_lib.weights(state) if saves or stops else ()
          self._check_finite(step, row, weights, checkpoints)
        # A row ends at the same steps wherever a run was cut off. So it does
        # where it is evaluated or saved, but not where SIGTERM stops it.
        ends_row = saves or evaluates or logs
        if ends_row:
          seconds = (time.perf_counter() - clock) / (step - timed_from)
          means = self._write_row(step, row, seconds, writer)
          epoch_means.append(means)
          row = []
          bar.set_postfix_str(f'loss {means["loss"]:.3f}', refresh=False)
        if step % self.steps_per_epoch == 0:
          self._warn_of_collapse(step, epoch_means)
          epoch_means = []
        if evaluates:
          shown = average or state_lib.weights(state)
          try:
            record = evaluate(*shown, has_router=self._has_router)
          except NotFinite as error:
            self._give_up(str(error), step, checkpoints)
          self._report(step, record, writer, means)
        if ends_row:
          timed_from, clock = step, time.perf_counter()
        # Saved last: whoever resumes from here finds all rows up to here.
        if saves or stops:
          checkpoints.save(step, state, average, row)
        if stops:
          break
    return state, average

  def batches(self, start: int):
    """This process's parts of the batches from a step on, on its devices."""
    batches = self._run.data.train_batches(
      self._source,
      size_px=self._step.model.image_px,
      batch_size=self._step_images,
      seed=self._data_seed,
      start_step=start,
      process=jax.process_index(),
      num_processes=jax.process_count(),
    )
    with contextlib.closing(batches):
      for step, batch in enumerate(batches, start + 1):
        labels = batch['label'].astype(np.int32)
        part = {'image': batch['image'], 'label': labels}
        part = mesh_lib.shard_batch(part, self._step.mesh)
        yield self._augment(part, self._key, step)

  def _write_row(self, step, row, seconds, writer) -> dict[str, float]:
    """Writes the means of the steps of a row, each of which took `seconds`."""
    means = {k: float(np.mean([m[k] for m in row])) for k in row[0]}
    update = (step - 1) // self._stage.accumulate
    means['learning_rate'] = float(self._rate(update))
    rates = {'images_per_second': self._step_images / seconds}
    writer.write(step, {f'train/{k}': v for k, v in means.items()}, rates)
    return means

  def _report(self, step, record, writer, means) -> None:
    """Writes a validation, and prints it as one line."""
    epoch = step / self.steps_per_epoch
    parts = [
      f'{self.name}  epoch {epoch:.4g}/{self._stage.epochs:g}',
      f'loss {means["loss"]:.3f}',
    ]
    metrics = {}
    for score in scores.fixed_scores(record):
      metrics[f'{score.name.replace(" ", "_")}_top1'] = score.top1
      parts.append(f'{score.name}: {score.top1:.1%}')
    if self._has_router:
      router = scores.score(
        policy.router(record.costs, policy.routes(record)), record, 'router'
      )
      rival = scores.hull_top1(record, router.gmacs)
      metrics |= {
        'routed_top1': router.top1,
        'routed_gmacs': router.gmacs,
        'best_fixed_top1': rival,
      }
      options = record.options.names
      shares = ' '.join(
        f'{option} {share:.0%}'
        for option, share in zip(options, router.shares, strict=True)
      )
      cost = router.gmacs / record.costs.full
      parts.append(
        f'routed: {router.top1:.1%} at {cost:.0%} of the full cost '
        f'(best fixed there: {rival:.1%}; {shares})'
      )
    writer.write(step, {f'validation/{k}': v for k, v in metrics.items()})
    terminal.say('  '.join(parts))

  def _first_state(self, checkpoints: Checkpoints, weights):
    """State, average (or None) and unwritten row, as saved or fresh ones."""
    averages = self._stage.ema_decay > 0
    step = checkpoints.latest_step()
    if step is not None:
      terminal.say(f'{self.name}: resuming from step {step} of {self._last}')
      return checkpoints.restore(
        step, self._step.abstract, self._step.shardings, averages=averages
      )

    def begin(*weights):
      state = state_lib.begin(self._step.optimizer, *weights)
      return state, jax.tree.map(jnp.copy, weights) if averages else None

    of_state = self._step.shardings
    of_average = state_lib.weights(of_state) if averages else None
    begin = jax.jit(begin, out_shardings=(of_state, of_average))
    return *begin(*weights), []

  def _check_finite(self, step, row, weights, checkpoints) -> None:
    """Raises UserError if a loss of the row, or a weight, is not finite."""
    for i, metrics in enumerate(row, step + 1 - len(row)):
      if not np.isfinite(metrics['loss']):
        # It is of the weights after the step before, which are broken too.
        what = f'the loss of step {i} is {metrics["loss"]}'
        self._give_up(what, i - 1, checkpoints)
    if weights and not _all_finite(weights):
      what = f'the weights after step {step} are not finite'
      self._give_up(what, step, checkpoints)

  def _give_up(
    self, what: str, broken: int, checkpoints: Checkpoints
  ) -> NoReturn:
    """Removes the checkpoints from step `broken` on, and raises UserError."""
    step = checkpoints.forget(broken)
    good = 'there is none yet' if step is None else f'step {step} is kept'
    raise UserError(
      f'stage {self.name}: {what}. The last good checkpoint: {good}. Lower '
      f'config.{self.name}.schedule.lr, or set '
      f'config.{self.name}.optimizer.clip_norm.'
    )

  def _warn_of_collapse(self, step, epoch_means) -> None:
    for name in epoch_means[0] if epoch_means else ():
      share = np.mean([means[name] for means in epoch_means])
      if name.startswith('share') and share > 0.95:
        terminal.say(
          f'warning: {self.name}, epoch {step // self.steps_per_epoch}: '
          f'{name} is {share:.0%}; the predictor has collapsed onto one size. '
          f'In config.{self.name}.objective try target_gmacs between the costs '
          "of two sizes, gradient = 'all', a slower eta_warmup_epochs."
        )

  def _every(self, epochs: float) -> int:
    """Steps between two of what is done every so many epochs; 0 for never."""
    return max(self._in_steps(epochs), self._stage.accumulate) if epochs else 0

  def _in_steps(self, epochs: float) -> int:
    """Whole updates, counted in steps."""
    return round(epochs * self._updates_per_epoch) * self._stage.accumulate


def _fetched(row) -> list[dict[str, float]]:
  """Metrics of each step; waits for the device."""
  return [{k: float(v) for k, v in m.items()} for m in jax.device_get(row)]


@jax.jit
def _all_finite(tree) -> jax.Array:
  return jnp.all(
    jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])
  )
