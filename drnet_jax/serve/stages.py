# SPDX-License-Identifier: Apache-2.0
"""A network with exits, run stage by stage on the images that are still there.

A stage goes from one exit to the next and is compiled for a few batch sizes.
Images that go on wait, features and all, in the pool of the next stage: so
nothing of an image is computed after its exit.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from drnet_jax import routing
from drnet_jax.run import workdir
from drnet_jax.serve import pools
from drnet_jax.serve.engines import Engine
from drnet_jax.serve.pools import Pool
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
    of_batch = {batch: self._shapes(batch) for batch in self._batches}
    # Of each stage, what it begins with in a batch of each size.
    self._states = [
      {batch: shapes[k] for batch, shapes in of_batch.items()}
      for k in range(self.num_exits)
    ]
    jobs = {}
    for k, states in enumerate(self._states):
      for batch, state in states.items():
        jobs[k, 'run', batch] = functools.partial(self._compile_run, k, state)
      if k:  # the first stage takes crops
        jobs |= {(k, *key): job for key, job in pools.jobs(states).items()}
    self._compiled: list[dict] = [{} for _ in self._states]
    for (k, *key), program in in_parallel(jobs).items():
      self._compiled[k][tuple(key)] = program

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
    return self._compiled[option]['run', batch](inputs)

  def pool(self, option: int) -> Pool | None:
    """Of images on their way to an exit; None for the first: it takes crops."""
    return (
      Pool(self._states[option], self._compiled[option]) if option else None
    )

  def _shapes(self, batch: int) -> list[Any]:
    """The state that each stage begins with."""
    side = self._model.image_px
    states = [jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8)]
    for k, weights in enumerate(self._weights[:-1]):
      stage = functools.partial(self._model.stage, k + 1)
      states.append(jax.eval_shape(stage, *weights, states[-1])[1])
    return states

  def _compile_run(self, k: int, state: Any):
    def run(weights, state):
      logits, state = self._model.stage(k + 1, *weights, state)
      if k == self.num_exits - 1:
        state = ()
      return jax.nn.softmax(logits), state

    weights = self._weights[k]
    size = sum(x.nbytes for x in jax.tree.leaves(weights))
    return compile_program(run, weights, state, size)
