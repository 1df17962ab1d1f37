# SPDX-License-Identifier: Apache-2.0
"""Networks as XLA programs, compiled ahead of time."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from drnet_jax import routing
from drnet_jax.export.contract import PREDICTOR, Contract
from drnet_jax.export.programs import Program
from drnet_jax.serve import pools
from drnet_jax.serve.engines import Engine
from drnet_jax.serve.pools import Pool

_MOST_BAKED_BYTES = 2**30
IN_FLIGHT = 4  # batches whose results are still to be fetched
CPU_BATCH, _ACCELERATOR_BATCH = 16, 128


def buckets(batch: int, cpu_batch: int = CPU_BATCH) -> list[int]:
  """Batch sizes to compile for: one, a full `batch`, and what is left over.

  0 is for what suits the device; what suits a CPU is `cpu_batch`.
  """
  cpu = jax.default_backend() == 'cpu'
  batch = batch or (cpu_batch if cpu else _ACCELERATOR_BATCH)
  return sorted({1, max(batch // 4, 1), batch})


class XlaEngine(Engine):
  """Programs (see `export.programs`) compiled ahead of time.

  Each is compiled for batches of the sizes `batches`; others are padded.

  With `keep` images stay on the device on their way from one option to the
  next, if all are given the same crop. By default, where that is not a CPU.
  """

  in_flight = IN_FLIGHT

  def __init__(
    self,
    name: str,
    programs: Mapping[str, Program],
    contract: Contract,
    *,
    batches: Sequence[int],
    keep: bool | None = None,
  ):
    self.name = name
    self._batches = sorted(set(batches))
    self.best_batch = self._batches[-1]
    self._programs = contract.programs
    weight_bytes = sum(
      x.nbytes for p in programs.values() for x in jax.tree.leaves(p.weights)
    )
    jobs = {}
    for program, (function, weights, side_px) in programs.items():
      for batch in self._batches:
        images = jax.ShapeDtypeStruct((batch, side_px, side_px, 3), np.uint8)
        jobs[program, batch] = functools.partial(
          compile_program, function, weights, images, weight_bytes
        )
    views = {*contract.views, contract.predictor_view} - {None}
    if keep is None:
      keep = jax.default_backend() != 'cpu'
    self._keeps = keep and len(views) == 1
    self._crops = {}
    if self._keeps:
      side_px = contract.views[0].side_px
      for batch in self._batches:
        shape = (batch, side_px, side_px, 3)
        self._crops[batch] = jax.ShapeDtypeStruct(shape, np.uint8)
      jobs |= pools.jobs(self._crops)
    self._compiled = in_parallel(jobs)

  def bucket(self, option: int | None, count: int) -> int:
    return routing.bucket(count, self._batches)

  def pool(self, option: int) -> Pool | None:
    return Pool(self._crops, self._compiled) if self._keeps else None

  def put(self, crops: np.ndarray) -> Any:
    if not self._keeps:
      return crops
    crops = padded(crops, routing.bucket(len(crops), self._batches))
    if jax.default_backend() == 'cpu':
      crops = crops.copy()  # what JAX is given it would go on reading
    return jax.device_put(crops)

  def log_p(self, images: Any) -> jax.Array:
    return self._run(PREDICTOR, images)

  def run(self, option: int, inputs: Any) -> tuple[jax.Array, Any]:
    return self._run(self._programs[option], inputs), inputs

  def _run(self, name: str, images: Any) -> jax.Array:
    batch = routing.bucket(len(images), self._batches)
    return self._compiled[name, batch](padded(images, batch))


def in_parallel(jobs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
  """Results of jobs that compile: XLA does so outside of Python's lock."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    futures = {key: threads.submit(job) for key, job in jobs.items()}
    return {key: future.result() for key, future in futures.items()}


def padded(images: Any, batch: int) -> Any:
  """Images, and black ones up to a number."""
  missing = batch - len(images)
  if not missing:
    return images
  return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])


def compile_program(
  function: Callable, weights: Any, inputs: Any, weight_bytes: int
) -> Callable:
  """A function of (weights, inputs) as a program of inputs.

  For a single image on a CPU the weights are constants of it, which makes XLA's
  code a fifth faster. Each program then holds a copy of them, so not where all
  programs together have too many `weight_bytes`.
  """
  single = jax.tree.leaves(inputs)[0].shape[0] == 1
  few = weight_bytes <= _MOST_BAKED_BYTES
  if single and few and jax.default_backend() == 'cpu':
    return jax.jit(functools.partial(function, weights)).lower(inputs).compile()
  program = jax.jit(function).lower(weights, inputs).compile()
  return functools.partial(program, weights)
