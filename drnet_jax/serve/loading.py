# SPDX-License-Identifier: Apache-2.0
"""Makes models ready to run: of a workdir, an exported folder, or in memory.

JAX is imported where something is left for it to do. Graphs once written of a
run's weights are kept (see `cache`), and after that the run needs JAX as little
as an exported folder does.
"""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from drnet_jax import cache, settings
from drnet_jax.choosing.policy import Policy
from drnet_jax.errors import UserError
from drnet_jax.export import contract as contract_lib
from drnet_jax.export.contract import Contract
from drnet_jax.run import paths
from drnet_jax.serve import choice as choice_lib
from drnet_jax.serve.choice import Choice, How
from drnet_jax.serve.engines import Engine, LadderEngine

if TYPE_CHECKING:
  from drnet_jax.run import workdir

_JAX = ('jax', 'f32')


class Loaded(NamedTuple):
  """A model, or a ladder of several, that is ready.

  Attributes:
    contract: of it.
    engine: that runs it.
    runtime: a line for people.
    digests: of all weights, as records know them; () of an exported folder.
    members: read the models themselves, for `export`.
    graphs: key of a model's graphs in the cache; '' where it has none.
    policy: that an exported folder follows.
  """

  contract: Contract
  engine: Engine
  runtime: str
  digests: tuple[str, ...] = ()
  members: 'tuple[Callable[[], workdir.Trained], ...]' = ()
  graphs: str = ''
  policy: Policy | None = None


def of_folder(folder: str, how: How, decode: str | None) -> Loaded:
  """What `export` wrote.

  Raises:
    UserError: it was not exported to that runtime's format, or for that way to
      decode.
  """
  fields = contract_lib.read_fields(folder)
  contract, formats = Contract.from_json(fields), fields['formats']
  policy = contract_lib.usual_policy(fields)
  if decode not in (None, contract.decode):
    raise UserError(
      f'{folder} was exported for decode={contract.decode}: export it again '
      f'with --decode={decode}'
    )
  runtime = how.runtime
  if runtime == 'jax':
    raise UserError(
      f"{folder} was exported: run it with runtime 'onnx', 'openvino' or "
      "'stablehlo'"
    )
  tried = choice_lib.candidates(how) if 'onnx' in formats else []
  if not tried and choice_lib.is_beside_jax(how):
    runtime = 'stablehlo' if 'stablehlo' in formats else 'onnx'
    tried = [(runtime, 'f32')]
  needed = 'stablehlo' if runtime == 'stablehlo' else 'onnx'
  if needed not in formats:
    raise UserError(
      f'{folder} was exported to {", ".join(formats)} only, not to {needed}'
    )
  if runtime == 'stablehlo':
    from drnet_jax.serve import compiled

    engine = compiled.exported(
      folder, contract, fields['stablehlo_weights'], how.batch
    )
    return Loaded(contract, engine, runtime, policy=policy)
  # Not JAX's, which would have to be compiled: they agreed when it was written.
  graphs = cache.key(cache.stamps([folder]))
  found = _choose(graphs, how, folder, contract, tried)
  engine = choice_lib.engine(*found[:2], folder, contract, how.batch)
  return Loaded(contract, engine, found.said, policy=policy)


def of_run(path: str, how: How, decode: str) -> Loaded:
  """A workdir's latest weights, or those of one checkpoint.

  Raises:
    UserError: no run, no weights, or a runtime that cannot run them.
  """

  def member():
    from drnet_jax import mesh
    from drnet_jax.run import workdir

    return workdir.load(path, mesh.create(1))

  run = _fingerprint(path, decode)
  known = cache.read_json('runs', run) if run else None
  if known and how.runtime in ('auto', 'onnx', 'openvino'):
    if ready := _of_known(known, how, member):
      return ready
  from drnet_jax.serve import compiled

  trained = member()
  loaded = of_trained(trained, how, decode)
  if run and loaded.graphs and compiled.is_known(trained):
    known = {'model': loaded.graphs, 'digest': trained.digest}
    cache.write_json('runs', run, known)
  return loaded


def _of_known(known: dict[str, str], how: How, member) -> Loaded | None:
  """A run whose graphs are there, if it is known how to run them."""
  folder = cache.folder('models', known['model'])
  if folder is None:
    return None
  contract = Contract.from_json(contract_lib.read_fields(folder))
  tried = choice_lib.candidates(how)
  if how.runtime == 'auto':
    beside = [_JAX] if choice_lib.is_beside_jax(how) else []
    found = choice_lib.remembered(known['model'], how, [*beside, *tried])
    if found is None or found.runtime == 'jax':
      return None
  else:
    found = _choose(known['model'], how, folder, contract, tried)
  engine = choice_lib.engine(*found[:2], folder, contract, how.batch)
  return Loaded(contract, engine, found.said, (known['digest'],), (member,))


def of_trained(trained: 'workdir.Trained', how: How, decode: str) -> Loaded:
  """A model in memory.

  Raises:
    UserError: weights that are not finite, or a runtime that cannot run them.
  """
  from drnet_jax.serve import compiled

  contract = Contract.of(trained, decode=decode)

  def loaded(engine: Engine, said: str, graphs: str = '') -> Loaded:
    digests, members = (trained.digest,), (lambda: trained,)
    return Loaded(contract, engine, said, digests, members, graphs)

  def in_jax(said: str = 'jax', graphs: str = '') -> Loaded:
    return loaded(compiled.in_jax(trained, contract, how.batch), said, graphs)

  compiled.check(trained, how.runtime)
  jax_will_do = choice_lib.is_beside_jax(how)
  if how.runtime == 'jax' or (jax_will_do and compiled.prefers_jax(trained)):
    return in_jax()
  if how.runtime == 'stablehlo':
    engine = compiled.in_stablehlo(trained, contract, how.batch)
    return loaded(engine, 'stablehlo')
  tried = choice_lib.candidates(how)
  if not tried:
    return in_jax()
  graphs = compiled.key(trained, contract)
  write = functools.partial(_write_graphs, trained, contract)
  try:
    folder = cache.folder('models', graphs) or cache.make_folder(
      'models', graphs, write
    )
  except UserError:
    # No `onnx` to write with, or nothing that it can write.
    if not jax_will_do:
      raise
    return in_jax()
  found = _choose(graphs, how, folder, contract, tried, trained)
  if found.runtime == 'jax':
    return in_jax(found.said, graphs)
  engine = choice_lib.engine(*found[:2], folder, contract, how.batch)
  return loaded(engine, found.said, graphs)


def joined(parts: dict[str, Loaded]) -> Loaded:
  """Several networks as a ladder, by their names.

  Raises:
    UserError: they do not know the same classes.
  """
  contracts = {name: part.contract for name, part in parts.items()}
  return Loaded(
    Contract.join(contracts),
    LadderEngine(
      [part.engine for part in parts.values()], list(contracts.values())
    ),
    '; '.join(f'{name}: {part.runtime}' for name, part in parts.items()),
    sum((part.digests for part in parts.values()), ()),
    sum((part.members for part in parts.values()), ()),
  )


def _write_graphs(trained, contract: Contract, folder: str) -> None:
  from drnet_jax.export import package, programs

  made = programs.programs(trained, contract)
  package.write_onnx(folder, made, fold_norms=True)
  fields = contract.to_json() | {'formats': ['onnx']}
  settings.write_json(os.path.join(folder, contract_lib.FILE), fields)


def _choose(
  graphs: str,
  how: How,
  folder: str,
  contract: Contract,
  tried: list[tuple[str, str]],
  trained: Any = None,
) -> Choice:
  """One of the candidates; `trained` is run by JAX besides."""
  makers: dict[tuple[str, str], Callable[[], Engine]] = {}
  if trained is not None and choice_lib.is_beside_jax(how):
    from drnet_jax.serve import compiled

    batch = how.batch or choice_lib.BATCH  # the one that is timed
    makers[_JAX] = functools.partial(
      compiled.in_jax, trained, contract, batch, few=True
    )
  # float32 first: the others are compared with it.
  for key in sorted(tried, key=lambda key: key[1] != 'f32'):
    makers[key] = functools.partial(
      choice_lib.engine, *key, folder, contract, how.batch
    )
  if len(makers) == 1:
    ((runtime, precision),) = makers
    return Choice(runtime, precision, choice_lib.name(runtime, precision))
  return choice_lib.remembered(graphs, how, makers) or choice_lib.choose(
    graphs, how, makers, contract
  )


def _fingerprint(path: str, decode: str) -> str | None:
  """Of all that a run's weights and contract are read from; None: unreadable.

  It need not be known which checkpoint counts: a change of any is a change.
  """
  root, *only = paths.parts(path)
  files = ('config.json', 'classes.json', 'checkpoints')
  try:
    found = cache.stamps([os.path.join(root, name) for name in files])
  except OSError:  # being written
    return None
  return cache.key(found, only, decode, cache.code()) if found else None
