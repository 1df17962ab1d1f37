# SPDX-License-Identifier: Apache-2.0
"""Models in memory, made ready in JAX or in graphs that are written of them."""

import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from drnet_jax import cache, settings
from drnet_jax.errors import UserError
from drnet_jax.export import contract as contract_lib
from drnet_jax.export import package
from drnet_jax.export.contract import Contract
from drnet_jax.export.programs import Program, programs
from drnet_jax.models.ranet import RANet
from drnet_jax.run import workdir
from drnet_jax.serve import choice, xla
from drnet_jax.serve.choice import How
from drnet_jax.serve.engines import Engine
from drnet_jax.serve.loading import Loaded, choose
from drnet_jax.serve.stages import StageEngine
from drnet_jax.serve.xla import XlaEngine, buckets

# Exits have many small operations, each with a start of its own; so small
# images run in larger batches, of this many pixels.
_CPU_EXIT_PIXELS = 2**15


def of_trained(trained: workdir.Trained, how: How) -> Loaded:
  """Makes a model ready.

  Raises:
    UserError: weights that are not finite, or a runtime that cannot run them.
  """
  # Graphs are in float32, and a processor has no units for the half precision
  # that it may have been trained in.
  is_graph = how.is_halved or how.runtime not in ('auto', 'jax')
  if is_graph or how.precision == 'f32' or jax.default_backend() == 'cpu':
    trained = trained.in_float32()
  contract = Contract.of(trained, decode=how.decode or 'full')
  # Not left to the answers: XLA does not always hand a NaN on.
  weights = jax.tree.leaves((trained.params, trained.batch_stats))
  if not all(np.isfinite(x).all() for x in weights):
    raise UserError(f'{trained.origin}: the weights hold NaN or infinity')
  if isinstance(trained.model, RANet) and (
    how.is_halved or how.runtime not in ('auto', 'jax')
  ):
    asked = 'precision' if how.is_halved else 'runtime'
    raise UserError(
      f'{asked} = {getattr(how, asked)!r}: a network with exits runs in JAX '
      'only'
    )
  engine, said, graphs = _engine(trained, contract, how)
  digests, members = (trained.digest,), (lambda: trained,)
  return Loaded(contract, engine, said, digests, members, graphs)


def _engine(
  trained: workdir.Trained, contract: Contract, how: How
) -> tuple[Engine, str, str]:
  """The engine, what is said of it, and the name of its graphs, or ''."""
  if how.runtime == 'stablehlo':
    # The programs as they would be exported.
    with tempfile.TemporaryDirectory() as folder:
      made = programs(trained, contract)
      shared = package.write_stablehlo(folder, made, share=False)
      engine = exported(folder, contract, shared, how.batch)
    return engine, 'stablehlo', ''
  in_jax = functools.partial(_in_jax, trained, contract, how.batch)
  has_exits, backend = isinstance(trained.model, RANet), jax.default_backend()
  jax_is_best = has_exits or backend != 'cpu'
  tried = [] if jax_is_best and how.is_beside_jax else choice.candidates(how)
  if not tried:
    return in_jax(), 'jax', ''
  made = programs(trained, contract)
  graphs = _key(made, contract)
  write = functools.partial(_write_graphs, made, contract)
  try:
    folder = cache.folder('models', graphs) or cache.make_folder(
      'models', graphs, write
    )
  except UserError:
    # No `onnx` to write with, or nothing that it can write.
    if not how.is_beside_jax:
      raise
    return in_jax(), 'jax', ''
  reference = None
  if how.is_beside_jax:
    timed = [how.batch or choice.BATCH]
    reference = functools.partial(
      XlaEngine, 'jax', made, contract, batches=timed
    )
  found = choose(graphs, how, folder, contract, tried, reference)
  if found.runtime == 'jax':
    return in_jax(), found.said, graphs
  engine = choice.exported_engine(*found[:2], folder, contract, how.batch)
  return engine, found.said, graphs


def _in_jax(trained: workdir.Trained, contract: Contract, batch: int) -> Engine:
  """The model's own programs."""
  if isinstance(trained.model, RANet):
    pixels = trained.model.image_px**2
    cpu_batch = max(xla.CPU_BATCH, _CPU_EXIT_PIXELS // pixels)
    return StageEngine(trained, batches=buckets(batch, cpu_batch))
  made = programs(trained, contract)
  return XlaEngine('jax', made, contract, batches=buckets(batch))


def _write_graphs(
  made: dict[str, Program], contract: Contract, folder: str
) -> None:
  package.write_onnx(folder, made, fold_norms=True)
  fields = contract.to_json() | {'formats': ['onnx']}
  settings.write_json(os.path.join(folder, contract_lib.FILE), fields)


def exported(
  folder: str,
  contract: Contract,
  shared: Mapping[str, Sequence[str]],
  batch: int,
) -> Engine:
  """The StableHLO programs of a folder that `package.write` wrote.

  Args:
    folder: to read.
    contract: that it holds.
    shared: for programs that take their weights as arguments, what these are
      called in the folder's `weights.npz`.
    batch: images that are run at once; 0 for what suits the device.
  """
  arrays = {}
  if shared:
    with np.load(os.path.join(folder, package.STABLEHLO_WEIGHTS)) as file:
      arrays = {name: jax.device_put(file[name]) for name in file.files}
  made = {}
  for name, view in contract.views_of_programs.items():
    with open(os.path.join(folder, f'{name}.stablehlo'), 'rb') as file:
      call = jax.export.deserialize(bytearray(file.read())).call
    if name in shared:
      weights = [arrays[key] for key in shared[name]]
      made[name] = Program(call, weights, view.side_px)
    else:
      made[name] = Program(lambda _, x, f=call: f(x), (), view.side_px)
  return XlaEngine('stablehlo', made, contract, batches=buckets(batch))


def _key(made: dict[str, Program], contract: Contract) -> str:
  """Of the graphs of a model: what they are written from, and by."""
  parts = [contract.to_json(), cache.code()]
  for name, (function, weights, side_px) in made.items():
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
