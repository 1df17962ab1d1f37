# SPDX-License-Identifier: Apache-2.0
"""Steps that are one program: each image of the batch goes the same way."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import models
from drnet_jax.steps import ahead
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.state import TrainState


class WholeStep:
  """Compiles once, and calls, the `_train_step` that a subclass has.

  Its arguments and results are those of `__call__`. A subclass also names its
  `model_class` and `objective_class`, and in `trains` the groups of parameters
  that it trains.

  Args:
    model: to train.
    optimizer: over the whole parameter tree.
    mesh: devices to run on.
    objective: what is minimised, of the subclass's `objective_class`.
    batch_size, steps_per_epoch: unused: every step takes them, for `RoutedStep`
      needs them.
  """

  def __init__(
    self,
    model: models.Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    objective: Any,
    *,
    batch_size: int,
    steps_per_epoch: int,
  ):
    del batch_size, steps_per_epoch
    self._objective = objective
    self._model = model
    self._optimizer = optimizer
    self._mesh = mesh
    shardings = mesh_lib.shardings(state_lib.abstract(model, optimizer), mesh)
    self._step = ahead.Program(
      self._train_step,
      donate_argnums=0,
      out_shardings=(shardings, mesh_lib.replicated(mesh)),
    )

  def compile(self, state: TrainState, batch: dict[str, jax.Array]) -> None:
    """Compiles ahead of the first step."""
    with ahead.Compiling() as compiling:
      compiling(self._step, state, batch, ahead.KEY)

  def __call__(
    self, state: TrainState, batch: dict[str, jax.Array], key: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step.

    Args:
      state: donated.
      batch: 'image' uint8 [B, H, H, 3] and 'label' int [B] or float [B, K],
        sharded by batch.
      key: the run's key.

    Returns:
      The new state and scalar metrics, still on the device.
    """
    return self._step(state, batch, key)
