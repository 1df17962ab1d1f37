# SPDX-License-Identifier: Apache-2.0
"""What runs the networks: XLA programs, or graphs that were exported.

An engine is given batches and gives back

    log_p(images)  [B, R], the predictor's log-probabilities, and
    run(j, inputs) [B, K], the probabilities of the classes at option j, and
                   what a later option goes on with

where `images` are uint8 [B, S, S, 3] with S as the contract says, as `put` has
made them of crops, and so are `inputs`, unless the option goes on with what an
earlier one left, or with the predictor's images (`pool`). An engine may return
more rows than it was given (a bucket's padding) and may return before it is
done; `numpy.asarray` waits. Here are those that need no
JAX; those that do are in `xla` and `stages`.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from drnet_jax.errors import UserError
from drnet_jax.export.contract import PREDICTOR, Contract

INT8 = 'int8'  # the precision of graphs that were exported so, see `int8`


def cores() -> int:
  """Of the processor, that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def full_name(runtime: str, precision: str) -> str:
  """Of a runtime in a precision, for people."""
  return runtime if precision == 'f32' else f'{runtime} in {precision}'


class Engine(Protocol):
  """See the module."""

  name: str
  best_batch: int  # that bulk work should come in
  in_flight: int  # batches that keep the device busy

  def bucket(self, option: int | None, count: int) -> int:
    """How many images are computed at an option where `count` are asked for.

    With None, in the predictor.
    """
    return count

  def pool(self, option: int) -> Any | None:
    """Where images wait for an option that is not the first they come to.

    They go on with what the predictor or an earlier option left.
    """
    return None  # they wait as crops

  def put(self, crops: np.ndarray) -> Any:
    """Crops, uint8 [B, S, S, 3], as `log_p` and `run` take them."""
    return crops

  def log_p(self, images: Any) -> Any: ...

  def run(self, option: int, inputs: Any) -> tuple[Any, Any]: ...


def onnx_network(path: str) -> Callable[[np.ndarray], np.ndarray]:
  """An ONNX file as a function of images, in onnxruntime on the CPU.

  Raises:
    UserError: onnxruntime is not installed.
  """
  # It would report over the network what is run, and leave the machine a number
  # to be known by.
  os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
  try:
    import onnxruntime
  except ImportError as error:
    raise UserError(
      f"runtime='onnx' needs onnxruntime: pip install 'drnet_jax[export]' "
      f'({error})'
    ) from error
  _share_arena()
  options = onnxruntime.SessionOptions()
  options.add_session_config_entry('session.use_env_allocators', '1')
  # Waiting threads must not keep cores from decoding, or from another graph.
  options.add_session_config_entry('session.intra_op.allow_spinning', '0')
  session = onnxruntime.InferenceSession(
    path, options, providers=['CPUExecutionProvider']
  )
  return lambda images: session.run(None, {'images': images})[0]


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


class GraphEngine(Engine):
  """Exported ONNX graphs in a runtime that takes any batch.

  `networks` makes functions of images of graphs' files.
  """

  def __init__(
    self,
    folder: str,
    contract: Contract,
    networks: Callable[[Sequence[str]], Sequence[Callable]],
  ):
    def load(*names: str) -> Sequence[Callable]:
      return networks([os.path.join(folder, f'{name}.onnx') for name in names])

    self._predictor = load(PREDICTOR)[0] if contract.routes else None
    self._networks = load(*contract.programs)

  def log_p(self, images: np.ndarray) -> Any:
    return self._predictor(images)

  def run(self, option: int, inputs: np.ndarray) -> tuple[Any, None]:
    return self._networks[option](inputs), None


class OnnxEngine(GraphEngine):
  """In onnxruntime, on the CPU; `batch` is for bulk work, 0 for what suits."""

  name = 'onnx'
  in_flight = 1  # a call returns when it is done

  def __init__(self, folder: str, contract: Contract, *, batch: int = 0):
    super().__init__(folder, contract, lambda x: [*map(onnx_network, x)])
    # On a CPU an image costs no less in a large batch, and caches are small.
    self.best_batch = batch or 8


class LadderEngine(Engine):
  """Several networks' engines as one, its options one after another.

  Its predictor is that of the first network that has one.
  """

  def __init__(self, members: Sequence[tuple[Engine, Contract]]):
    engines = [engine for engine, _ in members]
    self._options = [
      (engine, j) for engine, c in members for j in range(len(c.options))
    ]
    chain = [link for _, c in members for link in c.options.chain]
    self._exits = {option for option, link in enumerate(chain) if link >= 0}
    self._router = next((e for e, c in members if c.routes), None)
    self.name = ' + '.join(dict.fromkeys(engine.name for engine in engines))
    self.best_batch = min(engine.best_batch for engine in engines)
    self.in_flight = max(engine.in_flight for engine in engines)

  def bucket(self, option: int | None, count: int) -> int:
    engine, j = self._router, None
    if option is not None:
      engine, j = self._options[option]
    return engine.bucket(j, count)

  def pool(self, option: int) -> Any | None:
    engine, j = self._options[option]
    # What one network left is nothing to another; only exits follow each other.
    return engine.pool(j) if option in self._exits else None

  def log_p(self, images: np.ndarray) -> Any:
    return self._router.log_p(images)

  def run(self, option: int, inputs: Any) -> tuple[Any, Any]:
    engine, j = self._options[option]
    return engine.run(j, inputs)
