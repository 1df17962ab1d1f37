# SPDX-License-Identifier: Apache-2.0
"""Engines of what JAX runs, made of trained models or exported programs."""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from drnet_jax import cache
from drnet_jax.errors import UserError
from drnet_jax.export import package
from drnet_jax.export.contract import PREDICTOR, Contract
from drnet_jax.export.programs import Program, programs
from drnet_jax.models.ranet import RANet
from drnet_jax.run import workdir
from drnet_jax.serve import xla
from drnet_jax.serve.engines import Engine
from drnet_jax.serve.stages import StageEngine
from drnet_jax.serve.xla import XlaEngine, buckets

# Exits have many small operations, each with a start of its own; so small
# images run in larger batches, of this many pixels.
_CPU_EXIT_PIXELS = 2**15


def check(trained: workdir.Trained, runtime: str) -> None:
  """Raises UserError where a model cannot be run, or not in that runtime."""
  # Not left to the answers: XLA does not always hand a NaN on.
  weights = jax.tree.leaves((trained.params, trained.batch_stats))
  if not all(np.isfinite(x).all() for x in weights):
    raise UserError(f'{trained.origin}: the weights hold NaN or infinity')
  if isinstance(trained.model, RANet) and runtime not in ('auto', 'jax'):
    raise UserError(
      f"runtime = {runtime!r}: a network with exits runs in 'jax' only"
    )


def prefers_jax(trained: workdir.Trained) -> bool:
  """Whether nothing else need be tried."""
  return isinstance(trained.model, RANet) or jax.default_backend() != 'cpu'


def in_jax(
  trained: workdir.Trained, contract: Contract, batch: int, *, few: bool = False
) -> Engine:
  """The model's own programs; see `exported` on `batch`.

  With `few` only for a batch of just that size, which is not 0 then.
  """
  if isinstance(trained.model, RANet):
    pixels = trained.model.image_px**2
    cpu_batch = max(xla.CPU_BATCH, _CPU_EXIT_PIXELS // pixels)
    return StageEngine(trained, batches=buckets(batch, cpu_batch))
  batches = [batch] if few else buckets(batch)
  return XlaEngine(
    'jax', programs(trained, contract), contract, batches=batches
  )


def in_stablehlo(
  trained: workdir.Trained, contract: Contract, batch: int
) -> Engine:
  """The programs as they would be exported."""
  made = programs(trained, contract)
  with tempfile.TemporaryDirectory() as folder:
    shared = package.write_stablehlo(folder, made, share=False)
    return exported(folder, contract, shared, batch)


def exported(
  folder: str,
  contract: Contract,
  shared: Mapping[str, Sequence[str]],
  batch: int,
) -> Engine:
  """The StableHLO programs of a folder.

  Args:
    folder: from `package.write`.
    contract: its contract.
    shared: for programs that take their weights as arguments, what these are
      called in the folder's `weights.npz`.
    batch: images that are run at once; 0 for what suits the device.
  """
  sides = {
    name: view.side_px
    for name, view in zip(contract.programs, contract.views, strict=True)
  }
  if contract.routes:
    sides[PREDICTOR] = contract.predictor_view.side_px
  arrays = {}
  if shared:
    with np.load(os.path.join(folder, package.STABLEHLO_WEIGHTS)) as file:
      arrays = {name: jax.device_put(file[name]) for name in file.files}
  made = {}
  for name, side_px in sides.items():
    with open(os.path.join(folder, f'{name}.stablehlo'), 'rb') as file:
      call = jax.export.deserialize(bytearray(file.read())).call
    if name in shared:
      weights = [arrays[key] for key in shared[name]]
      made[name] = Program(call, weights, side_px)
    else:
      made[name] = Program(lambda _, x, call=call: call(x), (), side_px)
  return XlaEngine('stablehlo', made, contract, batches=buckets(batch))


def key(trained: workdir.Trained, contract: Contract) -> str:
  """Of the graphs of a model: what they are written from, and by."""
  parts = [contract.to_json(), cache.code()]
  for name, (function, weights, side_px) in programs(trained, contract).items():
    images = jax.ShapeDtypeStruct((1, side_px, side_px, 3), np.uint8)
    traced = jax.make_jaxpr(function)(weights, images)
    arrays = [*traced.consts, *jax.tree.leaves(weights)]
    parts += [name, str(traced.jaxpr)]
    parts += [hashlib.sha256(np.ascontiguousarray(x)).digest() for x in arrays]
  return cache.key(*parts)


def is_known(trained: workdir.Trained) -> bool:
  """Whether its networks are of this package, whose code `cache` knows."""
  networks = [trained.model.base, trained.model.predictor]
  return all(
    network is None or type(network).__module__.startswith('drnet_jax.')
    for network in networks
  )
