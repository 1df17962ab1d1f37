# SPDX-License-Identifier: Apache-2.0
"""What each size costs on this machine, in milliseconds."""

import time

import jax
import numpy as np

from drnet_jax.deploy.budget import Costs
from drnet_jax.deploy.contract import Contract
from drnet_jax.deploy.engines import Engine

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
  seconds: list[list[float]] = [[] for _ in jobs]
  for turn in range(_BETWEEN + rounds):
    for job, taken in zip(jobs, seconds, strict=True):
      start = time.perf_counter()
      np.asarray(job())
      if turn >= _BETWEEN:
        taken.append(time.perf_counter() - start)
  ms = [1e3 * float(np.median(taken)) / batch for taken in seconds]
  return Costs(
    unit='ms',
    sizes=tuple(ms[: len(contract.resolutions)]),
    predictor=ms[-1] if contract.has_router else 0.0,
    source=f'{engine.name}, batch {batch}, {jax.devices()[0].device_kind}',
  )
