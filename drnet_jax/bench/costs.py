# SPDX-License-Identifier: Apache-2.0
"""What each option costs on this machine, in milliseconds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from drnet_jax.bench import stopwatch
from drnet_jax.choosing.options import Costs
from drnet_jax.export.contract import PREDICTOR, Contract
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.engines import Engine

_ROUNDS = 20  # of which the median counts


def of_this_machine(
  load: Callable[..., Classifier], *, batch: int = 1, **how: str
) -> Costs:
  """`measure` of what `load(batch=..., **how)` makes."""
  classifier = load(batch=batch, **how)
  return measure(classifier.contract, classifier.engine, batch=batch)


def measure(contract: Contract, engine: Engine, *, batch: int) -> Costs:
  """Times the predictor and every option, in turn: milliseconds of an image.

  `batch` images in a call, as far as the engine has programs for so many.
  """
  batch = min(batch, engine.best_batch)
  jobs = calls(contract, engine, batch)
  taken = stopwatch.interleaved(
    jobs, _ROUNDS, 'measure', least_s=stopwatch.OF_A_NETWORK_S
  )
  ms = {name: stopwatch.ms(taken[name], batch) for name in jobs}
  options: list[float] = []
  for j, name in enumerate(contract.options.names):
    before = options[-1] if _goes_on(contract, j) else 0.0
    options.append(before + ms[name])
  return Costs(
    unit='ms',
    options=tuple(options),
    predictor=ms.get(PREDICTOR, 0.0),
    source=f'{engine.name}, batch {batch}, {jax.devices()[0].device_kind}',
  )


def calls(
  contract: Contract, engine: Engine, batch: int
) -> dict[str, Callable[[], Any]]:
  """Jobs on noise: by name the predictor and every option; of exits, stages."""
  jobs, state = {}, None
  if contract.routes:
    views = noise(contract.predictor_view.side_px, batch)
    jobs[PREDICTOR] = lambda: np.asarray(engine.log_p(views))
  for j, name in enumerate(contract.options.names):
    side_px = contract.views[j].side_px
    inputs = state if _goes_on(contract, j) else noise(side_px, batch)
    run = functools.partial(engine.run, j, inputs)
    jobs[name] = lambda run=run: np.asarray(run()[0])
    _, state = run()
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
