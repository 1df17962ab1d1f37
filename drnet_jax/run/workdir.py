# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its directory, and a trained model read back from it.

config.json       the config the run was begun with
classes.json      class names, in label order
held_out.json     which training images were set aside, if any
checkpoints/      <stage>/<step>, see `checkpoint`; initial/0, weights from
                  elsewhere (`convert`)
metrics.csv       and tensorboard/, see `log`
calibration.json  and calibration.npz, see `choosing.calibration`
sessions.jsonl    when, where and with which code it was trained and evaluated
report/           see `evaluate`
"""

import contextlib
import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import models, processes, settings
from drnet_jax.errors import NotHeldOut, UserError
from drnet_jax.run import paths, provenance
from drnet_jax.run.checkpoint import Checkpoints

if TYPE_CHECKING:  # a model is read without its data
  from drnet_jax.data.pipeline import Data
  from drnet_jax.data.selection import Some
  from drnet_jax.data.sources import Examples, Source

# Fields that may differ from those a run was begun with. These change nothing
# that is computed:
FREE = (
  'config.checkpoint_every_epochs',
  'config.data.class_map',
  'config.data.classes',
  'config.data.data_dir',
  'config.data.max_bad_images',
  'config.data.max_pixels',
  'config.data.threads',
  'config.data.workers',
  'config.eval_batch_size',
  'config.keep_checkpoints',
  'config.log_every_steps',
  'config.parameter_shards',
  'config.*.eval_every_epochs',
)
# These help where a loss is not finite:
REMEDIES = ('config.*.schedule.lr', 'config.*.optimizer.clip_norm')
# And these may differ where a trained model is evaluated:
_OF_EVALUATION = ('config.data.*', 'config.eval_batch_size')

# What was recorded of the test split, in a workdir.
TEST_RECORD = os.path.join('report', 'record.npz')
EVALUATION = os.path.join('report', 'evaluation.json')
PICTURES = 'pictures'  # of the report

_NEEDED = ('data', 'eval_batch_size', 'model', 'stages')  # of every config

_HELD_OUT = 'held_out.json'
_OTHERS = (
  '{file} names other images than are held out now: the data set or the random '
  'numbers have changed. Use the images that were there, or train in another '
  '--workdir'
)

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
    config: that the run was trained with, data as it lies now.
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

  def in_float32(self) -> 'Trained':
    """The same weights in networks that compute in float32."""
    model, networks = self.model, {}
    for field in dataclasses.fields(model):
      network = getattr(model, field.name)
      if getattr(network, 'dtype', 'float32') != 'float32':
        networks[field.name] = network.clone(dtype='float32')
    changed = dataclasses.replace(model, **networks) if networks else model
    return dataclasses.replace(self, model=changed)


def begin(
  path: str, config: ml_collections.ConfigDict, class_names: tuple[str, ...]
) -> dict[str, tuple[Any, Any]]:
  """Makes a workdir for a run, or checks that this run is the one in it.

  A directory without a checkpoint yet is taken over. Of several processes all
  check, and the main one writes.

  Returns:
    Fields that are not as they were, with the value before and now: see `note`.

  Raises:
    UserError: the directory belongs to a run with another config.
  """
  ours = settings.plain(config)
  changed = {}
  if has_run(path):
    changed = settings.differences(
      settings.plain(read_config(path)), ours, 'config'
    )
    refused = [f for f in changed if not settings.matches(f, FREE + REMEDIES)]
    if refused:
      raise UserError(_another_config(path, refused, changed))
    if not changed:
      return {}
  if processes.is_main():
    try:
      os.makedirs(path, exist_ok=True)
      settings.write_json(os.path.join(path, 'classes.json'), class_names)
      settings.write_json(os.path.join(path, 'config.json'), ours)
    except OSError as error:
      raise UserError(f'cannot write to --workdir={path}: {error}') from error
  return changed


def _another_config(
  path: str, refused: Sequence[str], changed: Mapping[str, tuple[Any, Any]]
) -> str:
  what = '; '.join(
    f'{field} = {changed[field][1]!r} here, {changed[field][0]!r} there'
    for field in refused
  )
  remedy = 'Choose another --workdir, or set these fields as they were.'
  if all(field.endswith('.epochs') for field in refused):
    remedy = (
      'To train a run for longer, begin another with its weights: another '
      f'--workdir, --config.init_from={path}, --config.reset_head=False and in '
      '--config.stages the stage to repeat.'
    )
  return f'{path} holds a run with another config: {what}. {remedy}'


def note(
  path: str, what: str, changed: Mapping[str, tuple[Any, Any]] | None = None
) -> None:
  """Adds a line to `sessions.jsonl`: what begins now, and on what.

  That is 'train' or 'evaluate'; `changed` is what `begin` returned.
  """
  if processes.is_main():
    line = {'what': what} | provenance.now()
    if changed:
      line['changed'] = changed
    with open(os.path.join(path, 'sessions.jsonl'), 'a+') as file:
      file.seek(0)
      is_cut_off = file.read()[-1:] not in ('', '\n')  # by a full disk
      file.write('\n' * is_cut_off + json.dumps(line) + '\n')


def sessions(path: str) -> list[dict[str, Any]]:
  """What `note` wrote, in order; [] of an older run."""
  file, found = os.path.join(path, 'sessions.jsonl'), []
  if os.path.exists(file):
    with open(file) as lines:
      for line in lines:
        with contextlib.suppress(ValueError):  # a full disk leaves part of one
          found.append(json.loads(line))
  return found


def keep_held_out(path: str, seen: 'Some') -> None:
  """Notes which images are held out, or checks that they are still the same.

  They are all but those `seen`, of the training split.

  Raises:
    NotHeldOut: the run was begun with others.
  """
  file, whole = os.path.join(path, _HELD_OUT), seen.examples
  rows = np.setdiff1d(np.arange(len(whole)), seen.rows).tolist()
  if not (os.path.exists(file) and has_trained(path)):
    names = _names(whole, rows)
    now = {'of': len(whole), 'rows': rows, 'names': names}
    settings.write_json(file, now)
  elif not _is_noted(file, whole, rows, exactly=True):
    raise NotHeldOut(_OTHERS.format(file=file))


def forget_held_out(path: str) -> None:
  """A run that holds nothing out takes over where none has trained yet."""
  file = os.path.join(path, _HELD_OUT)
  if os.path.exists(file) and not has_trained(path):
    os.remove(file)


def check_held_out(path: str, examples: 'Some') -> None:
  """Raises NotHeldOut if what was trained there has seen some of these."""
  if not has_trained(path):
    return
  file = os.path.join(path, _HELD_OUT)
  if not os.path.exists(file):
    raise NotHeldOut(
      f'{path} was trained without holding images out: those of now are among '
      'the ones that it has seen. Name others with calibrate --split, or train '
      'with config.data.held_out in another --workdir'
    )
  if not _is_noted(file, examples.examples, examples.rows):
    raise NotHeldOut(_OTHERS.format(file=file))


def _is_noted(
  file: str, whole: 'Examples', rows: Sequence[int], *, exactly: bool = False
) -> bool:
  """Whether these rows of a training split were noted as held out."""
  noted = settings.read_json(file)
  if isinstance(noted, list):  # of 0.4
    noted = {'rows': noted}
  elif noted['of'] != len(whole):
    return False
  elif noted['names'] != _names(whole, noted['rows']):
    return False
  then, now = set(noted['rows']), set(map(int, rows))
  return now == then if exactly else now <= then


def _names(examples: 'Examples', rows: Sequence[int]) -> int:
  """A checksum of the names of some, wherever the data set lies."""
  names = (os.path.basename(examples.name(row)) for row in rows)
  # Of a path the file, of a record in a file its number.
  plain = (name.rpartition(', ')[2] for name in names)
  return zlib.crc32('\n'.join(plain).encode())


def open_split(
  path: str,
  config: ml_collections.ConfigDict,
  split: str,
  class_names: Sequence[str],
) -> 'tuple[Data, Source]':
  """The data of the run in a workdir, and of it a split.

  Args:
    path: of the workdir.
    config: of the run, data as it lies now.
    split: its name.
    class_names: of the model, in label order.

  Raises:
    UserError: it cannot be opened, or has other classes than the model.
    NotHeldOut: of a split that is set aside of the training images, the model
      was trained on some.
  """
  from drnet_jax.data.pipeline import ASIDE, Data

  data = settings.call(Data, config.data, 'config.data')
  source = data.open(split, class_names)
  if split in ASIDE:
    check_held_out(path, source.examples)
  return data, source


def read_config(
  path: str, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """The config of the run in a workdir.

  `overrides` ('--config.data.<field>=<value>') are for data that has moved.

  Raises:
    UserError: no run was begun there, or its config is damaged.
  """
  file = os.path.join(path, 'config.json')
  if not os.path.exists(file):
    raise UserError(
      f'{path} is not a workdir of drnet_jax: it has no config.json. Train one '
      'with python -m drnet_jax.main --config=... --workdir=...'
    )
  config = settings.completed(settings.read_json(file))
  if missing := [name for name in _NEEDED if name not in config]:
    raise UserError(f'{file} is damaged: it lacks {", ".join(missing)}')
  config = ml_collections.ConfigDict(config)
  return settings.overridden(config, overrides, _OF_EVALUATION)


def class_names(path: str) -> tuple[str, ...]:
  """Of the run in a workdir, in label order."""
  return tuple(settings.read_json(os.path.join(path, 'classes.json')))


def load(path: str, mesh: Mesh, overrides: Sequence[str] = ()) -> Trained:
  """Reads weights from a workdir.

  Args:
    path: of the workdir, for the latest weights; or of one checkpoint in it,
      `<workdir>/checkpoints/<stage>/<step>`.
    mesh: where to put them.
    overrides: see `read_config`.

  Raises:
    UserError: there is no run, or none that has saved a checkpoint.
  """
  path, only_stage, only_step = paths.parts(path)
  config = read_config(path, overrides)
  names = class_names(path)
  model = models.create(config.model, num_classes=len(names))
  stages = (*reversed(config.stages), INITIAL)
  for stage in [only_stage] if only_stage else stages:
    if not os.path.isdir(os.path.join(path, 'checkpoints', stage)):
      continue
    with Checkpoints(path, stage, keep=None) as checkpoints:
      steps = checkpoints.steps()
      if not steps:
        continue
      step = steps[-1] if only_step is None else only_step
      if step not in steps:
        raise UserError(
          f'{path} has no checkpoint {stage}/{step}; there are {steps}'
        )
      params, batch_stats = checkpoints.restore_weights(
        step, *model.shapes, mesh_lib.replicated(mesh)
      )
    return Trained(
      model=model,
      params=params,
      batch_stats=batch_stats,
      has_router=stage != INITIAL and config[stage].step == 'routed',
      class_names=names,
      config=config,
      origin=f'stage {stage}, step {step}',
    )
  raise UserError(f'{path}: no complete checkpoint yet; continue training')


def has_run(path: str) -> bool:
  """Whether a run has been begun there, and has saved a checkpoint."""
  return bool(_saved_stages(path))


def has_trained(path: str) -> bool:
  """Whether there are weights that were trained there, not only put there."""
  return bool(_saved_stages(path) - {INITIAL})


def _saved_stages(path: str) -> set[str]:
  """Those with a checkpoint."""
  if not os.path.exists(os.path.join(path, 'config.json')):
    return set()
  root = os.path.join(path, 'checkpoints')
  return {
    os.path.basename(folder)
    for folder, steps, _ in os.walk(root, followlinks=True)
    if any(name.isdigit() for name in steps)
  }
