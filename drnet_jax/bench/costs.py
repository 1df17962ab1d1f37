# SPDX-License-Identifier: Apache-2.0
"""What each option costs on this machine, in milliseconds."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from drnet_jax.bench.stopwatch import interleaved
from drnet_jax.choosing.options import Costs
from drnet_jax.export.contract import Contract
from drnet_jax.serve.engines import Engine

_ROUNDS = 20  # of which the median counts


def measure(contract: Contract, engine: Engine, *, batch: int) -> Costs:
  """Times the predictor and every option, in turn.

  Args:
    contract: of the model.
    engine: runs it.
    batch: images in a call, as far as the engine has programs for so many.

  Returns:
    Milliseconds of an image.
  """
  batch = min(batch, engine.best_batch)
  jobs = option_jobs(contract, engine, batch)
  if contract.routes:
    views = noise(contract.predictor_view.side_px, batch)
    jobs['predictor'] = lambda: np.asarray(engine.log_p(views))
  taken = interleaved(jobs, _ROUNDS, 'measure')
  ms = {k: 1e3 * float(np.median(s)) / batch for k, s in taken.items()}
  options = []
  for j in range(len(contract.options)):
    before = options[-1] if _goes_on(contract, j) else 0.0
    options.append(before + ms[j])
  return Costs(
    unit='ms',
    options=tuple(options),
    predictor=ms.get('predictor', 0.0),
    source=f'{engine.name}, batch {batch}, {jax.devices()[0].device_kind}',
  )


def option_jobs(
  contract: Contract, engine: Engine, batch: int
) -> dict[Any, Callable[[], np.ndarray]]:
  """By the index of an option, a call of it on noise; of an exit its stage."""
  jobs, state = {}, None
  for j, view in enumerate(contract.views):
    inputs = state if _goes_on(contract, j) else noise(view.side_px, batch)
    jobs[j] = lambda j=j, x=inputs: np.asarray(engine.run(j, x)[0])
    _, state = engine.run(j, inputs)
  return jobs


def _goes_on(contract: Contract, j: int) -> bool:
  """Whether an option goes on with what the one before left."""
  chain = contract.options.chain
  return j > 0 and chain[j] >= 0 and chain[j - 1] == chain[j]


def noise(side_px: int, batch: int) -> np.ndarray:
  """uint8 [batch, side_px, side_px, 3]."""
  return np.random.default_rng(0).integers(
    0, 256, (batch, side_px, side_px, 3), dtype=np.uint8
  )
