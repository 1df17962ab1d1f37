# SPDX-License-Identifier: Apache-2.0
"""What steps of every kind have in common, and those that are one program."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import models
from drnet_jax.steps import ahead
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.state import TrainState


@dataclasses.dataclass(eq=False)
class Step:
  """One kind of training step; compiled, it is called once for each batch.

  A subclass names its `model_class` and `objective_class`, and in `trains` the
  groups of parameters that it trains.

  Attributes:
    model: to train.
    optimizer: over the whole parameter tree.
    mesh: devices to run on.
    objective: what is minimised, of the subclass's `objective_class`.
    batch_size: global.
    steps_per_epoch: unit of the objective's epochs.
  """

  model: models.Model
  optimizer: optax.GradientTransformation
  mesh: Mesh
  objective: Any
  _: dataclasses.KW_ONLY
  batch_size: int
  steps_per_epoch: int

  def __post_init__(self):
    """Prepares what a subclass needs besides."""

  @functools.cached_property
  def abstract(self) -> TrainState:
    """Shapes and dtypes of the state."""
    return state_lib.abstract(self.model, self.optimizer)

  @functools.cached_property
  def shardings(self) -> TrainState:
    """How the state lies between two steps."""
    return mesh_lib.shardings(self.abstract, self.mesh)


class WholeStep(Step):
  """Each image of the batch goes the same way, in the program `_train_step`.

  Its arguments and results are those of `__call__`.
  """

  @functools.cached_property
  def _program(self) -> ahead.Program:
    return ahead.Program(
      self._train_step,
      donate_argnums=0,
      out_shardings=(self.shardings, mesh_lib.replicated(self.mesh)),
    )

  def compile(
    self,
    state: TrainState,
    batch: dict[str, jax.Array],
    options: dict[str, Any] | None = None,
  ) -> int:
    """Compiles ahead of the first step; `options` as of `ahead.Compiling`.

    Returns how many programs lay in the persistent cache.
    """
    with ahead.Compiling(options) as compiling:
      compiling(self._program, state, batch, ahead.KEY)
    return compiling.cached

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
    return self._program(state, batch, key)
