# SPDX-License-Identifier: Apache-2.0
"""What each size or exit costs on this machine, in milliseconds."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from drnet_jax.export.contract import Contract
from drnet_jax.serve.budget import Costs
from drnet_jax.serve.engines import Engine
from drnet_jax.serve.stages import StageEngine

_BETWEEN = 2  # untimed calls first: caches, threads


def measure(
  contract: Contract, engine: Engine, *, batch: int, rounds: int = 20
) -> Costs:
  """Times the predictor and the network at each size, in turn.

  Args:
    contract: of the model.
    engine: runs it.
    batch: images in a call.
    rounds: timed calls of each; their median counts.

  Returns:
    Milliseconds of an image.
  """
  rng = np.random.default_rng(0)

  def images(side_px: int) -> np.ndarray:
    return rng.integers(0, 256, (batch, side_px, side_px, 3), dtype=np.uint8)

  jobs = []
  for j, size_px in enumerate(contract.resolutions):
    inputs = images(contract.input_px(size_px))
    jobs.append(lambda j=j, x=inputs: engine.probabilities(j, x))
  if contract.has_router:
    inputs = images(contract.input_px(contract.predictor_px))
    jobs.append(lambda x=inputs: engine.log_p(x))
  ms = [x / batch for x in _milliseconds(jobs, rounds)]
  return Costs(
    unit='ms',
    sizes=tuple(ms[: len(contract.resolutions)]),
    predictor=ms[-1] if contract.has_router else 0.0,
    source=f'{engine.name}, batch {batch}, {jax.devices()[0].device_kind}',
  )


def measure_stages(
  engine: StageEngine, *, batch: int, rounds: int = 20
) -> Costs:
  """Times each stage of a network with exits, in turn.

  Args:
    engine: runs it.
    batch: images in a call, as far as the engine has programs for so many.
    rounds: timed calls of each; their median counts.

  Returns:
    Milliseconds of an image up to each exit.
  """
  batch = engine.bucket(min(batch, engine.best_batch))
  ms = _milliseconds(stage_jobs(engine, batch), rounds)
  return Costs(
    unit='ms',
    sizes=tuple((np.cumsum(ms) / batch).tolist()),
    predictor=0.0,
    source=f'{engine.name}, batch {batch}, {jax.devices()[0].device_kind}',
  )


def stage_jobs(
  engine: StageEngine, batch: int
) -> list[Callable[[], jax.Array]]:
  """A call of each stage, on noise."""
  side = engine.image_px
  state = np.random.default_rng(0).integers(
    0, 256, (batch, side, side, 3), dtype=np.uint8
  )
  jobs = []
  for k in range(engine.num_exits):
    jobs.append(lambda k=k, state=state: engine.run(k, state)[0])
    _, state = engine.run(k, state)
  return jobs


def _milliseconds(jobs: Sequence[Callable], rounds: int) -> list[float]:
  """Median time of each call, all in turn."""
  seconds: list[list[float]] = [[] for _ in jobs]
  for turn in range(_BETWEEN + rounds):
    for job, taken in zip(jobs, seconds, strict=True):
      start = time.perf_counter()
      np.asarray(job())
      if turn >= _BETWEEN:
        taken.append(time.perf_counter() - start)
  return [1e3 * float(np.median(taken)) for taken in seconds]
