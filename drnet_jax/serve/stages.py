# SPDX-License-Identifier: Apache-2.0
"""A network with exits, run stage by stage on the images that are still there.

A stage goes from one exit to the next and is compiled for a few batch sizes.
Images that go on wait, features and all, in the pool of the next stage until
its batch is full: so hardly any padding is computed, and nothing of an image
after its exit. Pools stay on the device.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drnet_jax import routing
from drnet_jax.run import workdir
from drnet_jax.serve.engines import Engine
from drnet_jax.serve.xla import IN_FLIGHT, compile_program, in_parallel, padded


class StageEngine(Engine):
  """Compiled stages of a model with exits; `batches` as of `XlaEngine`."""

  name = 'jax'
  in_flight = IN_FLIGHT

  def __init__(self, trained: workdir.Trained, *, batches: Sequence[int]):
    self._batches = sorted(set(batches))
    self.best_batch = self._batches[-1]
    self.num_exits = len(trained.model.options)
    self._weights = [
      trained.model.stage_weights(k + 1, trained.params, trained.batch_stats)
      for k in range(self.num_exits)
    ]
    self._model = trained.model
    self._states = {batch: self._shapes(batch) for batch in self._batches}
    jobs = {}
    for k, batch in itertools.product(range(self.num_exits), self._batches):
      jobs['run', k, batch] = functools.partial(self._compile_run, k, batch)
      if k:  # the first stage takes crops
        jobs['push', k, batch] = functools.partial(self._compile_push, k, batch)
        jobs['pop', k, batch] = functools.partial(self._compile_pop, k, batch)
    self.compiled = in_parallel(jobs)

  def bucket(self, option: int, count: int) -> int:
    return routing.bucket(count, self._batches)

  def run(self, option: int, inputs: Any) -> tuple[jax.Array, Any]:
    """A stage: probabilities [B, K] of an exit, and the state after.

    The first takes images, a later one the state after the exit before, of a
    batch that is one of the buckets.
    """
    if option == 0:
      inputs = padded(inputs, self.bucket(0, len(inputs)))
    batch = len(jax.tree.leaves(inputs)[0])
    return self.compiled['run', option, batch](inputs)

  def pool(self, option: int) -> 'Pool | None':
    """Of images on their way to an exit; None for the first: it takes crops."""
    return Pool(self, option) if option else None

  def _shapes(self, batch: int) -> list[Any]:
    """The state that each stage begins with."""
    side = self._model.image_px
    states = [jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8)]
    for k, weights in enumerate(self._weights[:-1]):
      stage = functools.partial(self._model.stage, k + 1)
      states.append(jax.eval_shape(stage, *weights, states[-1])[1])
    return states

  def pool_shapes(self, k: int) -> Any:
    """Twice a batch: a whole one may join when one is full but for a place."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype),
      self._states[self.best_batch][k],
    )

  def _compile_run(self, k: int, batch: int):
    def run(weights, state):
      logits, state = self._model.stage(k + 1, *weights, state)
      if k == self.num_exits - 1:
        state = ()
      return jax.nn.softmax(logits), state

    weights, state = self._weights[k], self._states[batch][k]
    size = sum(x.nbytes for x in jax.tree.leaves(weights))
    return compile_program(run, weights, state, size)

  def _compile_push(self, k: int, batch: int):
    def push(pool, state, rows, start):
      put = jax.lax.dynamic_update_slice_in_dim
      return jax.tree.map(lambda p, x: put(p, x[rows], start, 0), pool, state)

    pool, state = self.pool_shapes(k), self._states[batch][k]
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    start = jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.jit(push, donate_argnums=0)
    return program.lower(pool, state, rows, start).compile()

  def _compile_pop(self, k: int, batch: int):
    def pop(pool, start):
      cut = jax.lax.dynamic_slice_in_dim
      return jax.tree.map(lambda x: cut(x, start, batch, 0), pool)

    start = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(pop).lower(self.pool_shapes(k), start).compile()


class Pool:
  """Images that wait for an engine's stage, with all that it needs of them."""

  def __init__(self, engine: StageEngine, exit_index: int):
    self._engine = engine
    self._exit_index = exit_index
    self._slots: Any = None
    self.waiting: list[Any] = []

  def push(self, state: Any, rows: Sequence[int], items: Sequence[Any]) -> None:
    """Adds the images of some rows of a batch, with its state."""
    engine = self._engine
    batch = len(jax.tree.leaves(state)[0])
    if self._slots is None:
      # Not jnp.zeros, which would be compiled now.
      self._slots = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype)),
        engine.pool_shapes(self._exit_index),
      )
    padded_rows = np.zeros(batch, np.int32)
    padded_rows[: len(rows)] = rows
    push = engine.compiled['push', self._exit_index, batch]
    start = np.int32(len(self.waiting))
    self._slots = push(self._slots, state, padded_rows, start)
    self.waiting += items

  def pop(self) -> tuple[Any, list[Any]]:
    """Takes the latest batch out: its state, in its bucket, and its images."""
    engine = self._engine
    count = min(len(self.waiting), engine.best_batch)
    start = len(self.waiting) - count
    batch = engine.bucket(self._exit_index, count)
    pop = engine.compiled['pop', self._exit_index, batch]
    # Before `pop`: if it fails, nobody must wait for these images.
    self.waiting, taken = self.waiting[:start], self.waiting[start:]
    return pop(self._slots, np.int32(start)), taken
