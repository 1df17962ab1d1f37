# SPDX-License-Identifier: Apache-2.0
"""The whole state of a training run: what a checkpoint holds."""

import functools
from collections.abc import Mapping
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
  run draws what the unbroken one would have drawn. For parameters and batch
  statistics see the model.
  """

  step: jax.Array  # int32 scalar, steps taken within the stage
  params: Any
  batch_stats: Any
  opt_state: Any  # of the stage's optimiser


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
  return jax.eval_shape(functools.partial(begin, optimizer), *model.shapes)


def advanced(
  state: TrainState,
  optimizer: optax.GradientTransformation,
  grads: Any,
  batch_stats: Any,
  *,
  chosen: Mapping[str, jax.Array] | None = None,
) -> TrainState:
  """The state one step on.

  Args:
    state: before it.
    optimizer: over the whole parameter tree.
    grads: of all parameters.
    batch_stats: after the step.
    chosen: bool of each set of norms, whether any image of the step ran with
      it. The others stay as they are, and so does what the optimiser remembers
      of them: weight decay and momentum would move them. Where several steps
      share an update, one image of any of them is enough. None moves all.
  """
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if chosen is not None:
    # Of optax.MultiSteps; 0 unless a step before had images of the set.
    earlier = optax.tree_utils.tree_get(state.opt_state, 'acc_grads')
    if earlier is not None:
      chosen = {
        name: moves | _any_nonzero(earlier['norm'][name])
        for name, moves in chosen.items()
      }

    def moved(path, old, new):
      name = _norm_set(path)
      return new if name is None else jnp.where(chosen[name], new, old)

    params, opt_state = jax.tree_util.tree_map_with_path(
      moved, (state.params, state.opt_state), (params, opt_state)
    )
  return TrainState(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
  )


def _norm_set(path) -> str | None:
  """The set of norms that a leaf of a state is of, from its path.

  What an optimiser remembers of parameters is a tree of the same keys, behind
  attributes and indices of its own.
  """
  is_dict = jax.tree_util.DictKey
  keys = [None, *(p.key if isinstance(p, is_dict) else None for p in path)]
  for before, group, name in zip(keys, keys[1:], keys[2:], strict=False):
    if before is None and group == 'norm':
      return name
  return None


def _any_nonzero(tree: Any) -> jax.Array:
  counts = [jnp.count_nonzero(x) for x in jax.tree.leaves(tree)]
  return jnp.asarray(sum(counts) > 0)  # a network may have no norms


def weights(state: TrainState) -> Weights:
  """What evaluation and deployment need of a state, or of its shardings."""
  return state.params, state.batch_stats


def average(
  old: Weights, state: TrainState, *, decay: float, accumulate: int
) -> Weights:
  """The running average of the weights, one step on.

  Args:
    old: the average before the step.
    state: after the step.
    decay: in [0, 1), of an update; after n updates at most (1 + n) / (10 + n),
      so that the first weights are soon forgotten (as in TensorFlow's moving
      averages).
    accumulate: steps to an update; between updates the average stays.
  """
  updates = state.step // accumulate
  decay = jnp.minimum(decay, (1 + updates) / (10 + updates))
  is_update = state.step % accumulate == 0
  return jax.tree.map(
    lambda a, x: jnp.where(is_update, a + (1 - decay) * (x - a), a),
    old,
    weights(state),
  )
