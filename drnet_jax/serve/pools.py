# SPDX-License-Identifier: Apache-2.0
"""Images that wait on the device, with all that their next network needs.

Images that leave a batch of one option together, and go on to different ones,
wait in the pool of the next until its batch is full: so hardly any padding is
computed, and nothing is sent to the device twice.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drnet_jax import routing


def _pool_shapes(states: Mapping[int, Any]) -> Any:
  """Twice a batch: a whole one may join when one is full but for a place."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype),
    states[max(states)],
  )


def jobs(states: Mapping[int, Any]) -> dict[tuple[str, int], Callable]:
  """Compile what moves images in and out of a pool; see `Pool`."""
  found = {}
  for batch, state in states.items():
    found['push', batch] = functools.partial(_compile_push, states, state)
    found['pop', batch] = functools.partial(_compile_pop, states, batch)
  return found


def _compile_push(states: Mapping[int, Any], state: Any) -> Callable:
  def push(pool, state, rows, start):
    put = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda p, x: put(p, x[rows], start, 0), pool, state)

  batch = jax.tree.leaves(state)[0].shape[0]
  rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
  start = jax.ShapeDtypeStruct((), jnp.int32)
  program = jax.jit(push, donate_argnums=0)
  return program.lower(_pool_shapes(states), state, rows, start).compile()


def _compile_pop(states: Mapping[int, Any], batch: int) -> Callable:
  def pop(pool, start):
    cut = jax.lax.dynamic_slice_in_dim
    return jax.tree.map(lambda x: cut(x, start, batch, 0), pool)

  start = jax.ShapeDtypeStruct((), jnp.int32)
  return jax.jit(pop).lower(_pool_shapes(states), start).compile()


class Pool:
  """Images that wait for an option.

  Args:
    states: by the sizes of batch, shapes of what is known of its images.
    compiled: what `jobs` of these returned, done.
  """

  def __init__(
    self,
    states: Mapping[int, Any],
    compiled: Mapping[tuple[str, int], Callable],
  ):
    self._batches = sorted(states)
    self._compiled = compiled
    self._shapes = _pool_shapes(states)
    self._slots: Any = None
    self.waiting: list[Any] = []

  def push(self, state: Any, rows: Sequence[int], items: Sequence[Any]) -> None:
    """Adds the images of some rows of a batch, with its state."""
    batch = len(jax.tree.leaves(state)[0])
    if self._slots is None:
      # Not jnp.zeros, which would be compiled now.
      self._slots = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), self._shapes
      )
    padded_rows = np.zeros(batch, np.int32)
    padded_rows[: len(rows)] = rows
    push, start = self._compiled['push', batch], np.int32(len(self.waiting))
    self._slots = push(self._slots, state, padded_rows, start)
    self.waiting += items

  def pop(self, most: int) -> tuple[Any, list[Any]]:
    """Takes the latest out: their state, in its bucket, and the images."""
    count = min(len(self.waiting), most)
    start = len(self.waiting) - count
    pop = self._compiled['pop', routing.bucket(count, self._batches)]
    # Before `pop`: if it fails, nobody must wait for these images.
    self.waiting, taken = self.waiting[:start], self.waiting[start:]
    return pop(self._slots, np.int32(start)), taken
