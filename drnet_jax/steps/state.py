# SPDX-License-Identifier: Apache-2.0
"""The whole state of a training run: what a checkpoint holds."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from drnet_jax.models import Model

Weights = tuple[Any, Any]  # (params, batch_stats)


@struct.dataclass
class TrainState:
  """Everything that changes from one step to the next.

  There is no random key in it: randomness is `fold_in(key, step)`, so a resumed
  run draws what the unbroken one would have drawn.

  Attributes:
    step: int32 scalar, steps taken within the stage.
    params: see the model.
    batch_stats: see the model.
    opt_state: of the stage's optimiser.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any


def begin(
  optimizer: optax.GradientTransformation, params, batch_stats
) -> TrainState:
  """The state before the first step of a stage."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=optimizer.init(params),
  )


def abstract(
  model: Model, optimizer: optax.GradientTransformation
) -> TrainState:
  """Shapes and dtypes of a state."""
  return jax.eval_shape(
    lambda key: begin(optimizer, *model.init(key)), jax.random.key(0)
  )


def advanced(
  state: TrainState,
  optimizer: optax.GradientTransformation,
  grads: Any,
  batch_stats: Any,
) -> TrainState:
  """The state one step on."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  return TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )


def weights(state: TrainState) -> Weights:
  """What evaluation and deployment need of a state, or of its shardings."""
  return state.params, state.batch_stats


def average(old: Weights, state: TrainState, *, decay: float) -> Weights:
  """The running average of the weights, one step on.

  Args:
    old: the average before the step.
    state: after the step.
    decay: in [0, 1); at most (1 + step) / (10 + step), so that the first
      weights are soon forgotten (as in TensorFlow's moving averages).
  """
  step = state.step
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(
    lambda a, x: a + (1 - decay) * (x - a), old, weights(state)
  )
