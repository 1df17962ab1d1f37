# SPDX-License-Identifier: Apache-2.0
"""What runs the networks: XLA programs, or graphs that were exported.

An engine is given batches of crops and gives back

    log_p(images)            [B, R], the predictor's log-probabilities
    probabilities(j, images) [B, K], of the classes, by the network at size j

where `images` are uint8 [B, S, S, 3] with S as the contract says. An engine may
return more rows than it was given images (a bucket's padding) and may return
before it is done; `numpy.asarray` waits.
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
from drnet_jax.export.contract import Contract
from drnet_jax.run import workdir as workdir_lib

# Weights as constants of a program make XLA's CPU code a fifth faster at batch
# 1, but each program then holds a copy.
MOST_BAKED_BYTES = 2**30
STABLEHLO_WEIGHTS = 'weights.npz'


class Engine(Protocol):
  """See the module.

  `best_batch` is what bulk work should come in, `bucket(n)` how many images
  are computed where n are asked for.
  """

  name: str
  best_batch: int

  def bucket(self, count: int) -> int: ...

  def log_p(self, images: np.ndarray) -> Any: ...

  def probabilities(self, size_index: int, images: np.ndarray) -> Any: ...


def predictor_program(model, weights, images: jax.Array) -> jax.Array:
  """log p of the sizes.

  Args:
    model: DRNet.
    weights: (params, batch_stats).
    images: uint8 [B, S, S, 3].

  Returns:
    float32 [B, R].
  """
  params, batch_stats = weights
  logits, _ = model.predict(
    params['predictor'], batch_stats['predictor'], images, train=False
  )
  return jax.nn.log_softmax(logits)


def network_program(model, size_px: int, weights, images: jax.Array):
  """Probabilities of the classes, as `predictor_program`: float32 [B, K]."""
  return jax.nn.softmax(model.logits_at(*weights, images, size_px))


def programs(
  trained: workdir_lib.Trained, contract: Contract
) -> dict[str, tuple[Callable, Any, int]]:
  """The functions that a model is at inference.

  Returns:
    By name ('predictor', 'r112', ...): a function of (weights, images), its
    weights, and the side of the images it is given. Each has its own part of
    the weights only.
  """
  model, found = trained.model, {}
  if contract.has_router:
    weights = (
      {'predictor': trained.params['predictor']},
      {'predictor': trained.batch_stats['predictor']},
    )
    found['predictor'] = (
      functools.partial(predictor_program, model),
      weights,
      contract.input_px(contract.predictor_px),
    )
  for size_px in model.resolutions:
    norm = model.norm_set(size_px)
    weights = (
      {
        'base': trained.params['base'],
        'norm': {norm: trained.params['norm'][norm]},
      },
      {'norm': {norm: trained.batch_stats['norm'][norm]}},
    )
    found[network_name(size_px)] = (
      functools.partial(network_program, model, size_px),
      weights,
      contract.input_px(size_px),
    )
  return found


def network_name(size_px: int) -> str:
  """Of the program (and of its files) for a size."""
  return f'r{size_px}'


class XlaEngine:
  """Programs compiled ahead of time, one per size and bucket.

  Args:
    name: of the path, for people.
    programs: as from `programs`.
    contract: of the model.
    batches: bucket sizes to compile for; a batch is padded to the next.
  """

  def __init__(
    self,
    name: str,
    programs: Mapping[str, tuple[Callable, Any, int]],
    contract: Contract,
    *,
    batches: Sequence[int],
  ):
    self.name = name
    self._batches = sorted(set(batches))
    self.best_batch = self._batches[-1]
    self._sizes = contract.resolutions
    weight_bytes = sum(
      x.nbytes for _, w, _ in programs.values() for x in jax.tree.leaves(w)
    )
    cpu = jax.default_backend() == 'cpu'
    jobs = {
      (name, batch): functools.partial(
        _compile,
        *parts,
        batch,
        baked=cpu and batch == 1 and weight_bytes <= MOST_BAKED_BYTES,
      )
      for name, parts in programs.items()
      for batch in self._batches
    }
    # XLA compiles outside of Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      futures = {key: pool.submit(job) for key, job in jobs.items()}
      self._compiled = {key: f.result() for key, f in futures.items()}

  def log_p(self, images: np.ndarray) -> jax.Array:
    return self._run('predictor', images)

  def probabilities(self, size_index: int, images: np.ndarray) -> jax.Array:
    return self._run(network_name(self._sizes[size_index]), images)

  def bucket(self, count: int) -> int:
    return routing.bucket(count, self._batches)

  def _run(self, name: str, images: np.ndarray) -> jax.Array:
    batch = self.bucket(len(images))
    missing = batch - len(images)
    if missing:
      images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
    return self._compiled[name, batch](images)


def _compile(program, weights, side_px: int, batch: int, *, baked: bool):
  images = jax.ShapeDtypeStruct((batch, side_px, side_px, 3), np.uint8)
  if baked:
    return jax.jit(functools.partial(program, weights)).lower(images).compile()
  compiled = jax.jit(program).lower(weights, images).compile()
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

    self._predictor = session('predictor') if contract.has_router else None
    self._networks = [
      session(network_name(size_px)) for size_px in contract.resolutions
    ]

  def bucket(self, count: int) -> int:
    return count  # any batch will do

  def log_p(self, images: np.ndarray) -> np.ndarray:
    return self._predictor.run(None, {'images': images})[0]

  def probabilities(self, size_index: int, images: np.ndarray) -> np.ndarray:
    return self._networks[size_index].run(None, {'images': images})[0]


def exported_programs(
  folder: str, contract: Contract, shared: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Callable, Any, int]]:
  """The StableHLO programs of an export folder, as from `programs`.

  Args:
    folder: from `package.write`.
    contract: its contract.
    shared: for programs that take their weights as arguments, what these are
      called in the folder's `weights.npz`.
  """
  sides = {network_name(r): contract.input_px(r) for r in contract.resolutions}
  if contract.has_router:
    sides['predictor'] = contract.input_px(contract.predictor_px)
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
      found[name] = exported.call, weights, side_px
    else:
      found[name] = _without_weights(exported.call), (), side_px
  return found


def _without_weights(call: Callable) -> Callable:
  return lambda weights, images: call(images)
