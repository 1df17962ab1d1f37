# SPDX-License-Identifier: Apache-2.0
"""Makes models ready to run: of a workdir, or an exported folder.

JAX is imported where something is left for it to do (see `compiled`). Graphs
once written of a run's weights are kept (see `cache`), and after that the run
needs JAX as little as an exported folder does.
"""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from drnet_jax import cache
from drnet_jax.choosing.policy import Policy
from drnet_jax.errors import UserError
from drnet_jax.export import contract as contract_lib
from drnet_jax.export.contract import Contract
from drnet_jax.run import paths
from drnet_jax.serve import choice as choice_lib
from drnet_jax.serve.choice import Choice, How
from drnet_jax.serve.engines import INT8, Engine, LadderEngine, full_name

if TYPE_CHECKING:
  from drnet_jax.run import workdir

JAX = ('jax', 'f32')


class Loaded(NamedTuple):
  """A model, or a ladder of several, that is ready."""

  contract: Contract
  engine: Engine
  runtime: str  # a line for people
  digests: tuple[str, ...] = ()  # of all weights; () of an exported folder
  # Each reads one of the models, for `export`.
  members: 'tuple[Callable[[], workdir.Trained], ...]' = ()
  graphs: str = ''  # key of a model's graphs in the cache, if it has some
  policy: Policy | None = None  # that an exported folder follows


def of_folder(folder: str, how: How) -> Loaded:
  """What `export` wrote.

  Raises:
    UserError: it is damaged, or was not exported to that runtime's format, or
      for that way to decode.
  """
  contract, policy, fields = contract_lib.read(folder)
  formats, is_int8 = fields['formats'], bool(fields.get('int8'))
  if how.decode not in (None, contract.decode):
    raise UserError(
      f'{folder} was exported for decode={contract.decode}: export it again '
      f'with --decode={how.decode}'
    )
  if how.runtime == 'jax':
    raise UserError(
      f"{folder} was exported: run it with runtime 'onnx', 'openvino' or "
      "'stablehlo'"
    )
  if is_int8 and how.precision != 'auto':
    raise UserError(
      f'{folder} was exported to int8: precision = {how.precision!r} cannot be '
      'had of it'
    )
  tried = choice_lib.candidates(how) if 'onnx' in formats else []
  if is_int8:  # nothing else to compute in
    tried = list(dict.fromkeys((runtime, INT8) for runtime, _ in tried))
  needed = 'stablehlo' if how.runtime == 'stablehlo' else 'onnx'
  if not tried and how.is_beside_jax and 'stablehlo' in formats:
    needed = 'stablehlo'
  if needed not in formats:
    raise UserError(
      f'{folder} was exported to {", ".join(formats)} only, not to {needed}'
    )
  graphs = cache.key(cache.stamps([folder]))
  # Without JAX, which would have to compile: `export` has compared them.
  found = choose(graphs, how, folder, contract, tried or [(needed, 'f32')])
  engine = choice_lib.exported_engine(*found[:2], folder, contract, how.batch)
  return Loaded(contract, engine, found.said, policy=policy)


def of_run(path: str, how: How) -> Loaded:
  """A workdir's latest weights, or those of one checkpoint.

  Raises:
    UserError: no run, no weights, or a runtime that cannot run them.
  """

  def member():
    from drnet_jax import mesh
    from drnet_jax.run import workdir

    return workdir.load(path, mesh.create(1))

  run = _fingerprint(path, how.decode or 'full')
  known = cache.read_json('runs', run) if run else None
  if known and how.runtime in ('auto', 'onnx', 'openvino'):
    if ready := _of_known(known, how, member):
      return ready
  from drnet_jax.serve import compiled

  trained = member()
  loaded = compiled.of_trained(trained, how)
  if run and loaded.graphs and compiled.is_known(trained):
    known = {'model': loaded.graphs, 'digest': trained.digest}
    cache.write_json('runs', run, known)
  return loaded


def _of_known(known: dict[str, str], how: How, member) -> Loaded | None:
  """A run whose graphs are cached, if it is known what is to run them."""
  folder = cache.folder('models', known['model'])
  if folder is None:
    return None
  contract = Contract.from_json(contract_lib.read_fields(folder))
  tried = choice_lib.candidates(how)
  if how.runtime == 'auto':
    beside = [JAX] if how.is_beside_jax else []
    found = choice_lib.remembered(known['model'], how, [*beside, *tried])
    if found is None or found.runtime == 'jax':
      return None
  else:
    found = choose(known['model'], how, folder, contract, tried)
  engine = choice_lib.exported_engine(*found[:2], folder, contract, how.batch)
  return Loaded(contract, engine, found.said, (known['digest'],), (member,))


def joined(parts: dict[str, Loaded]) -> Loaded:
  """Several networks as a ladder, by their names.

  Raises:
    UserError: they do not know the same classes.
  """
  return Loaded(
    Contract.join({name: part.contract for name, part in parts.items()}),
    LadderEngine([(part.engine, part.contract) for part in parts.values()]),
    '; '.join(f'{name}: {part.runtime}' for name, part in parts.items()),
    sum((part.digests for part in parts.values()), ()),
    sum((part.members for part in parts.values()), ()),
  )


def choose(
  graphs: str,
  how: How,
  folder: str,
  contract: Contract,
  tried: list[tuple[str, str]],
  in_jax: Callable[[], Engine] | None = None,
) -> Choice:
  """One of those to try, or JAX where `in_jax` makes its engine."""
  makers = {JAX: in_jax} if in_jax else {}
  # float32 first: the others are compared with it.
  for key in sorted(tried, key=lambda key: key[1] != 'f32'):
    makers[key] = functools.partial(
      choice_lib.exported_engine, *key, folder, contract, how.batch
    )
  if len(makers) == 1:
    ((runtime, precision),) = makers
    return Choice(runtime, precision, full_name(runtime, precision))
  return choice_lib.remembered(graphs, how, makers) or choice_lib.choose(
    graphs, how, makers, contract
  )


def _fingerprint(path: str, decode: str) -> str | None:
  """Key of what a run's weights and contract are read from; None: unreadable.

  It need not be known which checkpoint counts: a change of any is a change.
  """
  root, *only = paths.parts(path)
  files = ('config.json', 'classes.json', 'checkpoints')
  try:
    found = cache.stamps([os.path.join(root, name) for name in files])
  except OSError:  # being written
    return None
  return cache.key(found, only, decode, cache.code()) if found else None
