# SPDX-License-Identifier: Apache-2.0
"""A training run: reads what a config asks for, and runs its stages in order.

Running the same command on the same workdir resumes from the latest checkpoint;
randomness and data depend on the step alone, so the numbers are those of a run
never cut off, also on another number of processes or devices.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import models, processes, settings
from drnet_jax.data.pipeline import ASIDE, Data
from drnet_jax.errors import UserError
from drnet_jax.models import Model
from drnet_jax.run import head, workdir
from drnet_jax.run import weights as weights_lib
from drnet_jax.run.recording import Evaluator
from drnet_jax.run.stage import Stage, StageRunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """`config` itself.

  Attributes:
    seed: of weights, data order, augmentation and routing noise.
    init_from: workdir or file of PyTorch weights to begin the first stage
      with, see `weights`; '' for none.
    reset_head: replace the weights' classifier by one that is fitted to their
      features of the first stage's images, see `head`.
    model: see `models.create`.
    data: see `data.pipeline.Data`.
    stages: each stage by name, in order.
    eval_batch_size: images evaluated at a time, over all devices.
    log_every_steps: a row of metrics is the mean of at most so many steps.
    checkpoint_every_epochs: between checkpoints; one is always saved at the end
      of a stage, 0 for that one only.
    keep_checkpoints: how many of a stage to keep.
    parameter_shards: devices that share one copy of the parameters and of the
      optimiser's state: 1 for a copy on each, 0 for one on all together.
  """

  seed: settings.Whole
  init_from: settings.Path
  reset_head: bool
  model: Mapping[str, Any]
  data: Data
  stages: Mapping[str, Stage]
  eval_batch_size: settings.Natural
  log_every_steps: settings.Natural
  checkpoint_every_epochs: settings.Epochs
  keep_checkpoints: settings.Natural
  parameter_shards: settings.Whole


def train(config: ml_collections.ConfigDict, path: str) -> None:
  """Trains what a config describes, from scratch or from where it stopped.

  The config is a `Run`; the sections that its `stages` name are `Stage`s.

  Raises:
    UserError: the config, the workdir or the data cannot work, or the loss is
      not finite.
    Stopped: SIGTERM or Ctrl-C stopped it; its state is saved.
  """
  run = read(config)
  mesh = mesh_lib.create(parameter_shards=run.parameter_shards)
  mesh_lib.check_batch(run.eval_batch_size, mesh, 'config.eval_batch_size')
  data = run.data
  with processes.main_first('data'):
    is_new = not workdir.has_run(path)
    names = data.class_names() if is_new else workdir.class_names(path)
    source = data.open(data.train_split, names)
    validation = data.open(data.validation_split, names)
    # Also the test: else a mistake shows when all is trained.
    test = data.open(data.test_split, names)
  if len(names) < 2:
    raise UserError(
      f'{data.data_dir or data.name}: {names[0]!r} is the only class of '
      f'{data.train_split!r}; there is nothing to tell apart'
    )
  if run.init_from and is_new:
    named = {data.validation_split: validation, data.test_split: test}
    aside = {k: v.examples for k, v in named.items() if k in ASIDE}
    weights_lib.check_unseen(run.init_from, data, aside)
  seen, source = source.examples, data.with_unlabelled(source)
  model = models.create(run.model, num_classes=len(names))
  data.check_side(model.image_px)
  # All stages before the first is run: a mistake in the last shows at once.
  stages = [
    StageRunner(name, stage, run, mesh=mesh, model=model, source=source)
    for name, stage in run.stages.items()
  ]
  changed = workdir.begin(path, config, names)
  workdir.note(path, 'train', changed)
  if processes.is_main():
    if data.held_out:
      workdir.keep_held_out(path, seen)
    else:
      workdir.forget_held_out(path)
  processes.wait_for_all('workdir')

  begun = [i for i, s in enumerate(stages) if s.begun(path)]
  first = begun[-1] if begun else 0
  weights = None
  if not begun:
    weights = _initial_weights(run, mesh, model, names, stages[0])
  evaluate = functools.partial(
    Evaluator(model, mesh),
    data,
    validation,
    'validate',
    batch_size=run.eval_batch_size,
  )
  routed = [stage.step == 'routed' for stage in run.stages.values()]
  with processes.signals_noted():
    for i, stage in enumerate(stages[first:], first):
      if i > first and not any(routed[:i]):
        # As `load` does for this stage alone.
        weights = weights_lib.begin_predictor(model, weights)
      later = [s.name for s in stages[i + 1 :]]
      weights = stage.run(path, weights, evaluate, later)


def read(config: ml_collections.ConfigDict) -> Run:
  """Checks the fields of a config and of its stages.

  Raises:
    UserError: a field is missing, unknown or cannot work.
  """
  sections = dict(config)
  names = sections.pop('stages', ())
  settings.check_values({'stages': Sequence[str]}, {'stages': names}, 'config')
  if not names:
    raise UserError('config.stages is missing or empty; name at least one')
  if len({*names}) < len(names):
    raise UserError(
      f'config.stages = {(*names,)} names a stage twice: to repeat one, give a '
      'copy of its section another name'
    )
  defined = {}
  for name, section in [*sections.items()]:
    # A stage may be defined and left out: its section is known by its step.
    is_section = isinstance(section, Mapping | ml_collections.ConfigDict)
    if is_section and (name in names or 'step' in section):
      stage = settings.call(Stage, sections.pop(name), f'config.{name}')
      stage.check(f'config.{name}')
      defined[name] = stage
  for name in names:
    if name not in defined:
      raise UserError(f'config.stages names {name!r}; config.{name} is missing')
  if 'data' in sections:
    sections['data'] = settings.call(Data, sections['data'], 'config.data')
  stages = {name: defined[name] for name in names}
  return settings.call(Run, sections, 'config', stages=stages)


def _initial_weights(
  run: Run,
  mesh: Mesh,
  model: Model,
  class_names: tuple[str, ...],
  first: StageRunner,
):
  """(params, batch_stats) to begin the first stage with."""
  weights = jax.device_put(
    models.initial_weights(model, run.seed, draw_base=not run.init_from),
    mesh_lib.replicated(mesh),
  )
  if not run.init_from:
    logging.info('\n%s', parameter_overview.get_parameter_overview(weights[0]))
    return weights
  params, stats = weights_lib.load(
    run.init_from,
    model,
    weights,
    mesh,
    class_names=class_names,
    reset_head=run.reset_head,
  )
  if run.reset_head:
    with contextlib.closing(first.batches(0)) as batches:
      epoch = itertools.islice(batches, first.steps_per_epoch)
      params = head.fitted(model, params, stats, epoch, mesh)
  return params, stats
