# SPDX-License-Identifier: Apache-2.0
"""What runs the networks: XLA programs, or graphs that were exported.

An engine is given batches and gives back

    log_p(images)  [B, R], the predictor's log-probabilities, and
    run(j, inputs) [B, K], the probabilities of the classes at option j, and
                   what a later option of the same network goes on with

where `images` are uint8 [B, S, S, 3] with S as the contract says, and so are
`inputs`, unless the option goes on with what an earlier one left (`pool`). An
engine may return more rows than it was given (a bucket's padding) and may
return before it is done; `numpy.asarray` waits.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from drnet_jax import routing
from drnet_jax.errors import UserError
from drnet_jax.export.contract import PREDICTOR, Contract
from drnet_jax.export.package import STABLEHLO_WEIGHTS
from drnet_jax.export.programs import Program

# Weights as constants of a program make XLA's CPU code a fifth faster at batch
# 1, but each program then holds a copy.
MOST_BAKED_BYTES = 2**30


class Engine(Protocol):
  """See the module.

  `best_batch` is what bulk work should come in, `bucket(j, n)` how many images
  are computed at option j where n are asked for, `pool(j)` where images wait
  that go on with what an earlier option left, None if they wait as crops.
  """

  name: str
  best_batch: int

  def bucket(self, option: int, count: int) -> int: ...

  def pool(self, option: int) -> Any | None: ...

  def log_p(self, images: np.ndarray) -> Any: ...

  def run(self, option: int, inputs: Any) -> tuple[Any, Any]: ...


class XlaEngine:
  """Programs compiled ahead of time, one per size and bucket.

  Args:
    name: of the path, for people.
    programs: as from `export.programs`.
    contract: of the model.
    batches: bucket sizes to compile for; a batch is padded to the next.
  """

  def __init__(
    self,
    name: str,
    programs: Mapping[str, Program],
    contract: Contract,
    *,
    batches: Sequence[int],
  ):
    self.name = name
    self._batches = sorted(set(batches))
    self.best_batch = self._batches[-1]
    self._programs = contract.programs
    weight_bytes = sum(
      x.nbytes for p in programs.values() for x in jax.tree.leaves(p.weights)
    )
    cpu = jax.default_backend() == 'cpu'
    self._compiled = in_parallel(
      {
        (name, batch): functools.partial(
          _compile,
          program,
          batch,
          baked=cpu and batch == 1 and weight_bytes <= MOST_BAKED_BYTES,
        )
        for name, program in programs.items()
        for batch in self._batches
      }
    )

  def bucket(self, option: int, count: int) -> int:
    return routing.bucket(count, self._batches)

  def pool(self, option: int) -> None:
    return None

  def log_p(self, images: np.ndarray) -> jax.Array:
    return self._run(PREDICTOR, images)

  def run(self, option: int, inputs: np.ndarray) -> tuple[jax.Array, None]:
    return self._run(self._programs[option], inputs), None

  def _run(self, name: str, images: np.ndarray) -> jax.Array:
    batch = routing.bucket(len(images), self._batches)
    return self._compiled[name, batch](padded(images, batch))


def in_parallel(jobs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
  """Results of jobs that compile: XLA does so outside of Python's lock."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    futures = {key: threads.submit(job) for key, job in jobs.items()}
    return {key: future.result() for key, future in futures.items()}


def padded(images: np.ndarray, batch: int) -> np.ndarray:
  """Images, and black ones up to a number."""
  missing = batch - len(images)
  if not missing:
    return images
  return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])


def _compile(program: Program, batch: int, *, baked: bool):
  function, weights, side_px = program
  images = jax.ShapeDtypeStruct((batch, side_px, side_px, 3), np.uint8)
  if baked:
    return jax.jit(functools.partial(function, weights)).lower(images).compile()
  compiled = jax.jit(function).lower(weights, images).compile()
  return functools.partial(compiled, weights)


def onnx_session(path: str):
  """Opens an ONNX file in onnxruntime, on the CPU.

  Raises:
    UserError: onnxruntime is not installed.
  """
  try:
    import onnxruntime
  except ImportError as error:
    raise UserError(
      "runtime='onnx' needs onnxruntime: pip install 'drnet_jax[export]'"
    ) from error
  _share_arena()
  options = onnxruntime.SessionOptions()
  options.add_session_config_entry('session.use_env_allocators', '1')
  # Waiting threads must not keep cores from decoding, or from another graph.
  options.add_session_config_entry('session.intra_op.allow_spinning', '0')
  return onnxruntime.InferenceSession(
    path, options, providers=['CPUExecutionProvider']
  )


@functools.cache
def _share_arena() -> None:
  """Makes one memory arena for all graphs of this process.

  They run in turn, so the next size writes where the last one wrote, which is
  still in the processor's cache.
  """
  import onnxruntime

  memory = onnxruntime.OrtMemoryInfo(
    'Cpu',
    onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
    0,
    onnxruntime.OrtMemType.DEFAULT,
  )
  onnxruntime.create_and_register_allocator(memory, None)


class OnnxEngine:
  """Exported ONNX graphs in onnxruntime, on the CPU.

  Args:
    folder: from `package.write`.
    contract: its contract.
  """

  name = 'onnx'
  # On a CPU an image costs no less in a large batch, and caches are small.
  best_batch = 8

  def __init__(self, folder: str, contract: Contract):
    def session(name: str):
      return onnx_session(os.path.join(folder, f'{name}.onnx'))

    self._predictor = session(PREDICTOR) if contract.routes else None
    self._networks = [session(name) for name in contract.programs]

  def bucket(self, option: int, count: int) -> int:
    return count  # any batch will do

  def pool(self, option: int) -> None:
    return None

  def log_p(self, images: np.ndarray) -> np.ndarray:
    return self._predictor.run(None, {'images': images})[0]

  def run(self, option: int, inputs: np.ndarray) -> tuple[np.ndarray, None]:
    return self._networks[option].run(None, {'images': inputs})[0], None


class LadderEngine:
  """Several networks' engines as one, its options one after another.

  Args:
    engines: of the networks.
    contracts: of the same.
    router: index of the network whose predictor is asked.
  """

  def __init__(
    self, engines: Sequence[Engine], contracts: Sequence[Contract], router: int
  ):
    self._engines = engines
    self._places = [
      (k, j)
      for k, contract in enumerate(contracts)
      for j in range(len(contract.options))
    ]
    self._router = engines[router]
    self.name = ' + '.join(dict.fromkeys(engine.name for engine in engines))
    self.best_batch = min(engine.best_batch for engine in engines)

  def bucket(self, option: int, count: int) -> int:
    k, j = self._places[option]
    return self._engines[k].bucket(j, count)

  def pool(self, option: int) -> Any | None:
    k, j = self._places[option]
    return self._engines[k].pool(j)

  def log_p(self, images: np.ndarray) -> Any:
    return self._router.log_p(images)

  def run(self, option: int, inputs: Any) -> tuple[Any, Any]:
    k, j = self._places[option]
    return self._engines[k].run(j, inputs)


def exported_programs(
  folder: str, contract: Contract, shared: Mapping[str, Sequence[str]]
) -> dict[str, Program]:
  """The StableHLO programs of an export folder.

  Args:
    folder: from `package.write`.
    contract: its contract.
    shared: for programs that take their weights as arguments, what these are
      called in the folder's `weights.npz`.
  """
  sides = {
    name: view.side_px
    for name, view in zip(contract.programs, contract.views, strict=True)
  }
  if contract.routes:
    sides[PREDICTOR] = contract.predictor_view.side_px
  arrays = {}
  if shared:
    with np.load(os.path.join(folder, STABLEHLO_WEIGHTS)) as file:
      arrays = {name: jax.device_put(file[name]) for name in file.files}
  found = {}
  for name, side_px in sides.items():
    with open(os.path.join(folder, f'{name}.stablehlo'), 'rb') as file:
      exported = jax.export.deserialize(bytearray(file.read()))
    if name in shared:
      weights = [arrays[key] for key in shared[name]]
      found[name] = Program(exported.call, weights, side_px)
    else:
      found[name] = Program(_without_weights(exported.call), (), side_px)
  return found


def _without_weights(call: Callable) -> Callable:
  return lambda weights, images: call(images)
