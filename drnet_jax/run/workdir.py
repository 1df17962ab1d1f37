# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its directory, and a trained model read back from it.

config.json       the config the run was begun with
classes.json      class names, in label order
held_out.json     which training images were set aside, if any
checkpoints/      <stage>/<step>, see `checkpoint`; initial/0, weights from
                  elsewhere (`convert`)
metrics.csv       and tensorboard/, see `log`
sessions.jsonl    when, where and with which code it was trained and evaluated
report/           see `evaluate`
"""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import models, processes, settings
from drnet_jax.errors import UserError
from drnet_jax.run import provenance
from drnet_jax.run.checkpoint import Checkpoints

# Fields that may differ from those a run was begun with: what is computed does
# not depend on them.
_MAY_CHANGE = ('keep_checkpoints', 'parameter_shards')

# What was recorded of the test split, in a workdir.
TEST_RECORD = os.path.join('report', 'record.npz')

# In place of a stage's name: weights that no stage of this run has trained.
INITIAL = 'initial'


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model and its weights.

  Attributes:
    model: the networks.
    params, batch_stats: on the mesh, replicated.
    has_router: whether the predictor has been trained.
    class_names: in label order.
    config: that the run was begun with.
    origin: 'stage finetune, step 120', for people.
  """

  model: models.Model
  params: Any
  batch_stats: Any
  has_router: bool
  class_names: tuple[str, ...]
  config: ml_collections.ConfigDict
  origin: str

  @functools.cached_property
  def digest(self) -> str:
    """A checksum of the weights, by which records know what made them."""
    found = 0
    for x in jax.tree.leaves((self.params, self.batch_stats)):
      found = zlib.crc32(np.ascontiguousarray(x), found)
    return f'{found:08x}'


def begin(
  path: str, config: ml_collections.ConfigDict, class_names: tuple[str, ...]
) -> None:
  """Makes a workdir for a run, or checks that this run is the one in it.

  A directory without a checkpoint yet is taken over. Of several processes all
  check, and the main one writes.

  Raises:
    UserError: the directory belongs to a run with another config.
  """
  ours = settings.plain(config)
  if os.path.exists(_config_file(path)) and _has_checkpoint(path):
    theirs = settings.plain(read_config(path))
    for field in _MAY_CHANGE:
      theirs[field] = ours.get(field)
    differences = settings.differences(ours, theirs, 'config')
    if differences:
      raise UserError(
        f'{path} holds a run with another config: {"; ".join(differences)}. '
        'Choose another --workdir, or set these fields as they were.'
      )
    return
  if not processes.is_main():
    return
  try:
    os.makedirs(path, exist_ok=True)
    settings.write_json(os.path.join(path, 'classes.json'), class_names)
    settings.write_json(_config_file(path), ours)
  except OSError as error:
    raise UserError(f'cannot write to --workdir={path}: {error}') from error


def note(path: str, what: str) -> None:
  """Adds a line to `sessions.jsonl`: what begins now, and on what.

  Args:
    path: the workdir.
    what: 'train' or 'evaluate'.
  """
  if processes.is_main():
    with open(_sessions_file(path), 'a') as file:
      file.write(json.dumps({'what': what} | provenance.now()) + '\n')


def sessions(path: str) -> list[dict[str, str]]:
  """What `note` wrote, in order; [] of an older run."""
  if not os.path.exists(_sessions_file(path)):
    return []
  with open(_sessions_file(path)) as file:
    return [json.loads(line) for line in file]


def keep_held_out(path: str, rows: np.ndarray) -> None:
  """Writes which images are held out, or checks that they are still the same.

  Args:
    path: the workdir.
    rows: int [N], of the training split.

  Raises:
    UserError: the run was begun with others.
  """
  file = os.path.join(path, 'held_out.json')
  if not (os.path.exists(file) and _has_checkpoint(path)):
    settings.write_json(file, rows.tolist())
    return
  with open(file) as opened:
    kept = json.load(opened)
  if kept != rows.tolist():
    raise UserError(
      f'{file} names other images than are held out now: the data set or the '
      'random numbers have changed. Choose another --workdir.'
    )


def read_config(path: str) -> ml_collections.ConfigDict:
  """The config of the run in a workdir.

  Raises:
    UserError: no run was begun there.
  """
  try:
    with open(_config_file(path)) as file:
      return ml_collections.ConfigDict(settings.completed(json.load(file)))
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} is no workdir of drnet_jax (its config.json: {error}); train '
      'one with python -m drnet_jax.main --config=... --workdir=...'
    ) from error


def root(path: str) -> str:
  """The workdir that a path names: itself, or that of a checkpoint."""
  return _parts(path)[0]


def load(path: str, mesh: Mesh) -> Trained:
  """Reads weights from a workdir.

  Args:
    path: of the workdir, for the latest weights; or of one checkpoint in it,
      `<workdir>/checkpoints/<stage>/<step>`.
    mesh: where to put them.

  Raises:
    UserError: there is no run, or none that has saved a checkpoint.
  """
  path, only_stage, only_step = _parts(path)
  config = read_config(path)
  with open(os.path.join(path, 'classes.json')) as file:
    class_names = tuple(json.load(file))
  model = create_model(config.model, class_names)
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  stages = (*reversed(config.stages), INITIAL)
  for stage in [only_stage] if only_stage else stages:
    if not os.path.isdir(os.path.join(path, 'checkpoints', stage)):
      continue
    with Checkpoints(path, stage, keep=None) as checkpoints:
      step = checkpoints.latest_step() if only_step is None else only_step
      if step is None:
        continue
      if step not in checkpoints.steps():
        raise UserError(
          f'{path} has no checkpoint {stage}/{step}; there are '
          f'{checkpoints.steps()}'
        )
      params, batch_stats = checkpoints.restore_weights(
        step, *abstract, mesh_lib.replicated(mesh)
      )
    return Trained(
      model=model,
      params=params,
      batch_stats=batch_stats,
      has_router=stage != INITIAL and config[stage].step == 'routed',
      class_names=class_names,
      config=config,
      origin=f'stage {stage}, step {step}',
    )
  raise UserError(f'{path} holds no whole checkpoint yet; let the run go on')


def create_model(
  section: Mapping[str, Any], class_names: tuple[str, ...]
) -> models.Model:
  """The model of `config.model` for these classes."""
  return models.create(section, num_classes=len(class_names))


def _has_checkpoint(path: str) -> bool:
  return any(
    name.isdigit()
    for _, folders, _ in os.walk(os.path.join(path, 'checkpoints'))
    for name in folders
  )


def _parts(path: str) -> tuple[str, str | None, int | None]:
  """Workdir, stage and step that a path names."""
  parts = os.path.normpath(path).split(os.sep)
  if len(parts) > 2 and parts[-1].isdigit() and parts[-3] == 'checkpoints':
    workdir = os.sep.join(parts[:-3]) or ('.' if parts[0] else os.sep)
    return workdir, parts[-2], int(parts[-1])
  return path, None, None


def _sessions_file(path: str) -> str:
  return os.path.join(path, 'sessions.jsonl')


def _config_file(path: str) -> str:
  return os.path.join(path, 'config.json')
