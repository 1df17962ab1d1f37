# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a stage: Orbax, asynchronous, atomic.

The position in the data is the step (see `data.pipeline`), so the state is all
there is to save. A process killed during a save leaves a temporary directory
that Orbax neither lists nor loads.
"""

import os
import textwrap
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from drnet_jax.errors import UserError
from drnet_jax.steps.state import TrainState


class Checkpoints:
  """The checkpoints of one stage, `<workdir>/checkpoints/<stage>/<step>`.

  Args:
    workdir: of the run.
    stage: name of the stage.
    keep: how many of the latest to keep.
  """

  def __init__(self, workdir: str, stage: str, *, keep: int):
    self.directory = os.path.abspath(
      os.path.join(workdir, 'checkpoints', stage)
    )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True
      ),
    )

  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Steps of all whole checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: TrainState) -> None:
    """Starts to save; `state` may be donated as soon as this returns."""
    self._save(step, weights=_weights(state), optimizer=_optimizer(state))

  def save_weights(self, step: int, params, batch_stats) -> None:
    """Saves weights alone: enough to evaluate, not to go on training."""
    self._save(step, weights={'params': params, 'batch_stats': batch_stats})

  def _save(self, step: int, **items: Any) -> None:
    arguments = {k: ocp.args.StandardSave(tree) for k, tree in items.items()}
    try:
      self._manager.save(step, args=ocp.args.Composite(**arguments))
    except (OSError, ValueError) as error:
      raise self._cannot_save(error) from error

  def restore(self, step: int, abstract: TrainState, sharding: Sharding):
    """Loads the state of a step.

    Args:
      step: from `latest_step`.
      abstract: shapes and dtypes to expect.
      sharding: of every leaf.

    Raises:
      UserError: files are missing or damaged, or hold another model.
    """
    found = self._restore(
      step,
      sharding,
      weights=_weights(abstract),
      optimizer=_optimizer(abstract),
    )
    return TrainState(**found['weights'], **found['optimizer'])

  def restore_weights(self, step: int, params, batch_stats, sharding: Sharding):
    """Loads (params, batch_stats) alone; otherwise as `restore`."""
    weights = {'params': params, 'batch_stats': batch_stats}
    found = self._restore(step, sharding, weights=weights)['weights']
    return found['params'], found['batch_stats']

  def _cannot_save(self, error: Exception) -> UserError:
    return UserError(
      f'cannot save in {self.directory}: {error}. Checkpoints there are whole; '
      'run the same command again once there is room.'
    )

  def _restore(self, step: int, sharding: Sharding, **items: Any):
    def target(x):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arguments = {
      name: ocp.args.StandardRestore(jax.tree.map(target, tree))
      for name, tree in items.items()
    }
    path = os.path.join(self.directory, str(step))
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**arguments))
    # Orbax reports damage with whatever its storage layers raise.
    except Exception as error:
      reason = textwrap.shorten(str(error) or type(error).__name__, 200)
      raise UserError(
        f'checkpoint {path} is damaged or of another model ({reason}). '
        f'Delete {path} to go on from the checkpoint before it, or '
        f'{self.directory} to repeat the stage.'
      ) from error

  def close(self) -> None:
    """Waits for saves under way, then lets go."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as error:
      raise self._cannot_save(error) from error
    finally:
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *unused) -> None:
    self.close()


def _weights(state: TrainState) -> dict[str, Any]:
  return {'params': state.params, 'batch_stats': state.batch_stats}


def _optimizer(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'opt_state': state.opt_state}
