# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a stage: Orbax, asynchronous, atomic.

The position in the data is the step (see `data.pipeline`), so there is only the
state to save and, where SIGTERM came between two rows of metrics.csv, the
metrics of the steps since the last row. Beside them stand the names of the
classes, without which the weights mean nothing. A process killed during a save
leaves a temporary directory that Orbax neither lists nor loads, and that the
next one to save here removes. Of several processes each writes its part, and
all must call every method.
"""

import glob
import os
import shutil
import textwrap
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.sharding import Sharding

from drnet_jax import mesh as mesh_lib
from drnet_jax import processes, settings
from drnet_jax.data import classes as classes_lib
from drnet_jax.errors import UserError
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.state import TrainState, Weights

_OVERHEAD = 2**19  # bytes of a checkpoint that are not of its arrays


class _Manager(ocp.CheckpointManager):
  """Orbax's, but it never asks whether a signal has come: we do.

  It would ask with the steps that it saves: see `processes.should_stop`.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class Checkpoints:
  """The checkpoints of one stage, `<workdir>/checkpoints/<stage>/<step>`.

  The latest `keep` of them are kept; with None they are only read, also while
  another process trains.
  """

  def __init__(self, workdir: str, stage: str, *, keep: int | None):
    self.directory = os.path.abspath(
      os.path.join(workdir, 'checkpoints', stage)
    )
    names = os.path.join(workdir, 'classes.json')
    self._classes = settings.read_json(names) if os.path.exists(names) else []
    if keep is not None:
      self._remove_unfinished()
    self._manager = _Manager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=keep is not None
      ),
      item_handlers={
        'weights': ocp.StandardCheckpointHandler(),
        'average': ocp.StandardCheckpointHandler(),
        'optimizer': ocp.StandardCheckpointHandler(),
        'row': ocp.JsonCheckpointHandler(),
      },
    )

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: TrainState,
    average: Weights | None,
    row: list[dict[str, float]],
  ) -> None:
    """Starts to save; `state` may be donated as soon as this returns.

    With it goes the average of the weights, where the stage has one, and the
    metrics of the steps that no row of metrics.csv holds yet.
    """
    items = {'weights': _weights(*state_lib.weights(state))}
    if average is not None:
      items['average'] = _weights(*average)
    self._save(step, items | {'optimizer': _optimizer(state)}, row=row)

  def save_weights(self, step: int, params, batch_stats) -> None:
    """Saves weights alone: enough to evaluate, not to resume training."""
    self._save(step, {'weights': _weights(params, batch_stats)})

  def _save(self, step: int, trees: dict[str, Any], **values: Any) -> None:
    arguments = {k: ocp.args.StandardSave(tree) for k, tree in trees.items()}
    arguments |= {k: ocp.args.JsonSave(value) for k, value in values.items()}
    try:
      self._manager.wait_until_finished()
      self._check_room(trees)
      self._manager.save(
        step,
        args=ocp.args.Composite(**arguments),
        custom_metadata={'classes': self._classes},
      )
    except (OSError, ValueError) as error:
      raise self._cannot_save(error) from error

  def forget(self, step: int) -> int | None:
    """Removes the checkpoints from a step on; returns the latest one left."""
    self._manager.wait_until_finished()
    for later in self.steps():
      if later >= step:
        self._manager.delete(later)
    return self.latest_step()

  def restore(
    self, step: int, abstract: TrainState, shardings, *, averages: bool
  ) -> tuple[TrainState, Weights | None, list[dict[str, float]]]:
    """Loads what `save` saved of a step: state, average and row.

    Args:
      step: from `latest_step`.
      abstract: shapes and dtypes to expect.
      shardings: of the leaves; need not be those they were saved with.
      averages: whether the stage has an average of the weights.

    Raises:
      UserError: files are missing or damaged, cannot be read, or hold another
        model.
    """
    expected = mesh_lib.placed(abstract, shardings)
    weights = _weights(*state_lib.weights(expected))
    trees = {'weights': weights, 'optimizer': _optimizer(expected)}
    if averages:
      trees['average'] = weights
    found = self._restore(step, trees, row=ocp.args.JsonRestore())
    state = TrainState(**found['weights'], **found['optimizer'])
    average = None
    if averages:
      average = found['average']['params'], found['average']['batch_stats']
    return state, average, found['row']

  def restore_weights(
    self, step: int, params, batch_stats, sharding: Sharding
  ) -> Weights:
    """Loads weights to use: the averages, where there are any.

    Their shapes and dtypes must be those of `params` and `batch_stats`; every
    leaf gets the sharding.

    Raises:
      UserError: as `restore`.
    """
    expected = _weights(params, batch_stats)
    shardings = jax.tree.map(lambda _: sharding, expected)
    average = os.path.join(self.directory, str(step), 'average')
    item = 'average' if os.path.isdir(average) else 'weights'
    trees = {item: mesh_lib.placed(expected, shardings)}
    found = self._restore(step, trees)[item]
    return found['params'], found['batch_stats']

  def _remove_unfinished(self) -> None:
    """Removes what killed processes left of their saves.

    Orbax's own option does it in a thread, which lets the processes meet over
    their devices while training does the same, in any order.
    """
    if processes.is_main():
      pattern = os.path.join(
        glob.escape(self.directory), '*.orbax-checkpoint-tmp*'
      )
      for path in glob.glob(pattern):
        shutil.rmtree(path)
    processes.wait_for_all('unfinished checkpoints')

  def _check_room(self, trees: dict[str, Any]) -> None:
    """Raises UserError, on every process, if there is no room for another one.

    One process that cannot write keeps the others waiting for Orbax's time-out,
    ten minutes.
    """
    needed = _OVERHEAD + sum(x.nbytes for x in jax.tree.leaves(trees))
    free = min(processes.gather(shutil.disk_usage(self.directory).free))
    if free < needed:
      raise self._cannot_save(
        f'it takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free'
      )

  def _cannot_save(self, error: Exception | str) -> UserError:
    return UserError(
      f'cannot save in {self.directory}: {error}. Checkpoints there are '
      'intact; run the same command again once there is room.'
    )

  def _restore(self, step: int, trees: dict[str, Any], **others: Any):
    arguments = others | {
      name: ocp.args.StandardRestore(tree) for name, tree in trees.items()
    }
    path = os.path.join(self.directory, str(step))
    try:
      self._check_model(path, trees)
      self._check_classes(path, step)
      return self._manager.restore(step, args=ocp.args.Composite(**arguments))
    except UserError:
      raise
    # Orbax reports damage with whatever its storage layers raise.
    except Exception as error:
      reason = textwrap.shorten(str(error) or type(error).__name__, 200)
      if unreadable := _why_unreadable(error):
        raise UserError(
          f'checkpoint {path} cannot be loaded: {unreadable} ({reason})'
        ) from error
      raise UserError(
        f'checkpoint {path} is damaged ({reason}). Delete {path} to resume '
        f'from the one before it, or {self.directory} to repeat the stage.'
      ) from error

  def _check_model(self, path: str, trees: dict[str, Any]) -> None:
    """Raises UserError if the saved weights are not of these shapes."""
    for item in trees.keys() - {'optimizer'}:
      saved = ocp.StandardCheckpointHandler().metadata(epath.Path(path) / item)
      if different := differences(saved.tree, trees[item]):
        raise UserError(f'checkpoint {path} holds another model: {different}')

  def _check_classes(self, path: str, step: int) -> None:
    """Raises UserError if classes.json is not that of the run that saved."""
    metadata = self._manager.metadata(step).custom_metadata or {}
    classes = metadata.get('classes', self._classes)
    if classes != self._classes:
      raise UserError(
        f'checkpoint {path} is of a model with other classes than classes.json '
        f'lists: {classes_lib.difference(classes, self._classes)}. Put back '
        'the classes.json of that run.'
      )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *unused) -> None:
    """Waits for saves under way, then lets go."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as error:
      raise self._cannot_save(error) from error
    finally:
      self._manager.close()


def differences(there, here) -> str:
  """Where the shapes of two trees' leaves differ, in words; '' if nowhere."""
  there, here = _shapes(there), _shapes(here)
  different = [
    f'{name}: {there.get(name, "nothing")} there, '
    f'{here.get(name, "nothing")} here'
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  more = f'; and {len(different) - 5} more' if len(different) > 5 else ''
  return '; '.join(different[:5]) + more


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {name: tuple(x.shape) for name, x in flat.items()}


def _why_unreadable(error: BaseException | None) -> str:
  """What, other than damage, keeps a checkpoint from being read; or ''."""
  while error is not None:
    text = str(error)
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in text:
      return 'there is not enough memory'
    if isinstance(error, PermissionError) or 'PERMISSION_DENIED' in text:
      return 'permission is denied'
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
      return 'its files cannot be read'
    error = error.__cause__ or error.__context__
  return ''


def _weights(params, batch_stats) -> dict[str, Any]:
  return {'params': params, 'batch_stats': batch_stats}


def _optimizer(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'opt_state': state.opt_state}
