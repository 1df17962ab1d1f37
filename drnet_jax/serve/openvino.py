# SPDX-License-Identifier: Apache-2.0
"""Exported ONNX graphs in OpenVINO, on the CPU.

A single image has all threads to itself, in a program for a batch of one. Many
share the cores: each core has a batch of its own, without a word to the others.
A program is compiled when it is first run, so that neither time nor memory goes
to sizes, or ways to run them, that nobody asks for.
"""

import collections
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.serve.engines import INT8, GraphEngine, full_name

# What OpenVINO calls an ability of the processor, and the precision it is asked
# for by; the fastest first.
_ABILITIES = (('BF16', 'bf16'), ('FP16', 'f16'), ('FP32', 'f32'))
_TELEMETRY = 'openvino_telemetry'
# Fewer images than these cost more each: a batch is not cut smaller.
_LEAST_BATCH = 4


@functools.cache
def core() -> Any:
  """OpenVINO, which finds out about the processor once.

  Raises:
    UserError: it is not installed.
  """
  try:
    with without_telemetry():
      import openvino
  except ImportError as error:
    raise UserError(
      "runtime='openvino' needs OpenVINO: pip install 'drnet_jax[openvino]'"
    ) from error
  return openvino.Core()


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
  """For imports that would report over the network, from a forked process.

  Where OpenVINO and NNCF find no telemetry they keep to themselves.
  """
  hidden = _TELEMETRY not in sys.modules
  if hidden:
    sys.modules[_TELEMETRY] = None
  try:
    yield
  finally:
    if hidden:
      del sys.modules[_TELEMETRY]


def precisions(abilities: Iterable[str]) -> list[str]:
  """What to compute in: the fastest that the processor has, then float32.

  It has `abilities` as OpenVINO lists them, OPTIMIZATION_CAPABILITIES.
  """
  found = [name for ability, name in _ABILITIES if ability in {*abilities}]
  return list(dict.fromkeys([*found[:1], 'f32']))


def abilities() -> list[str]:
  """Those of this processor."""
  return list(core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'))


class OpenVinoEngine(GraphEngine):
  """See the module; `batch` is for bulk work, 0 for what suits.

  Raises:
    UserError: OpenVINO is not installed, or the processor lacks the precision.
  """

  def __init__(
    self, folder: str, contract: Contract, *, precision: str, batch: int
  ):
    there = [name for ability, name in _ABILITIES if ability in abilities()]
    if precision not in (*there, 'f32', INT8):
      raise UserError(
        f'precision = {precision!r}: this processor has {", ".join(there)} only'
      )
    # What is not in int8 in such graphs is computed as fast as it can be.
    rest = precisions(abilities())[0] if precision == INT8 else precision
    super().__init__(folder, contract, lambda path: Network(path, rest))
    self.name = full_name('openvino', precision)
    self.best_batch = batch or 16
    # One for each core, and one that waits for the first to be free.
    self.in_flight = (os.cpu_count() or 1) + 1


class Network:
  """One graph, of an ONNX file: for a single image, and for many."""

  def __init__(self, path: str, precision: str):
    # Its weights are mapped, not read.
    self._model = core().read_model(path)
    if precision != 'f32':
      _resize_in_half(self._model)
    self._precision = precision
    self._lock = threading.Lock()
    # Requests: one for a single image; for many one for each core, in turn,
    # with the answer that it is working on: the oldest is the first to be free.
    self._single: Any = None
    self._bulk: collections.deque | None = None

  def __call__(self, images: np.ndarray) -> Any:
    """[B, K] of uint8 [B, S, S, 3]; `numpy.asarray` waits."""
    with self._lock:
      if len(images) == 1:
        self._single = self._single or self._for_one(images.shape)
        # A request is one caller's at a time, and its output the next one's.
        found = self._single.infer({0: images}, share_inputs=True)
        return next(iter(found.values()))
      self._bulk = self._bulk or self._for_many()
      # Into how many pieces depends on nothing but their number: with its batch
      # the last digits of an answer may change.
      count = max(1, min(len(self._bulk), len(images) // _LEAST_BATCH))
      return _Joined([self._begin(x) for x in np.array_split(images, count)])

  def _for_one(self, shape: tuple[int, ...]) -> Any:
    fixed = self._model.clone()  # constants are shared
    fixed.reshape(list(shape))
    return self._compile('LATENCY', fixed).create_infer_request()

  def _for_many(self) -> collections.deque:
    compiled = self._compile('THROUGHPUT')
    count = compiled.get_property('OPTIMAL_NUMBER_OF_INFER_REQUESTS')
    return collections.deque(
      [compiled.create_infer_request(), None] for _ in range(count)
    )

  def _compile(self, hint: str, model: Any = None) -> Any:
    settings = {
      'PERFORMANCE_HINT': hint,
      'INFERENCE_PRECISION_HINT': self._precision,
      # Batches of several sizes run at once, each size with threads of its
      # own: pinned, those of two sizes may share a core while another is idle.
      'ENABLE_CPU_PINNING': False,
    }
    return core().compile_model(model or self._model, 'CPU', settings)

  def _begin(self, images: np.ndarray) -> '_Answer':
    oldest = self._bulk[0]
    self._bulk.rotate(-1)
    request, answer = oldest
    if answer is not None:
      answer.settle()
    request.start_async({0: images}, share_inputs=True)
    oldest[1] = _Answer(request, images)
    return oldest[1]


def _resize_in_half(model: Any) -> None:
  """Rewrites R x C, a resize, as (x C)ᵀ Rᵀ, turned back.

  OpenVINO computes a product in half precision only if the constant is its
  second factor, and what follows does not scale channels. A resize takes a
  third of the time of a small network at 64 px; so it takes half as long.
  """
  from openvino import opset13 as op

  def turned(node: Any) -> Any:
    return op.transpose(node, np.array([0, 1, 3, 2]))

  for rows in model.get_ordered_ops():
    readers = [x.get_node() for x in rows.output(0).get_target_inputs()]
    if not _is_product(rows, 0) or len(readers) != 1:
      continue
    columns = readers[0]
    if (
      not _is_product(columns, 1)
      or rows.output(0).partial_shape.rank.get_length() != 4
    ):
      continue
    x, r, c = rows.input_value(1), rows.input_value(0), columns.input_value(1)
    narrow = turned(op.matmul(x, c, False, False))
    resized = turned(op.matmul(narrow, r, False, True))
    for reader in columns.output(0).get_target_inputs():
      reader.replace_source_output(resized.output(0))


def _is_product(node: Any, constant: int) -> bool:
  """Whether it is a matrix product, with a constant there."""
  return (
    node.get_type_name() == 'MatMul'
    and node.input_value(constant).get_node().get_type_name() == 'Constant'
  )


class _Answer:
  """What a request will have found; kept when it goes on to the next images."""

  def __init__(self, request: Any, images: np.ndarray):
    self._request, self._images = request, images  # which it reads meanwhile
    self._lock = threading.Lock()
    self._value: np.ndarray | Exception | None = None

  def settle(self) -> None:
    """Waits for it."""
    with self._lock:
      if self._value is None:
        try:
          self._request.wait()
          self._value = self._request.get_output_tensor(0).data.copy()
        except RuntimeError as error:
          self._value = error  # for whoever asks for this answer
        self._request = self._images = None

  def get(self) -> np.ndarray:
    """[B, K]."""
    self.settle()
    if isinstance(self._value, Exception):
      raise self._value
    return self._value


class _Joined:
  """The answers to the pieces of a batch, as one array."""

  def __init__(self, answers: list[_Answer]):
    self._answers = answers

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    found = np.concatenate([answer.get() for answer in self._answers])
    return found if dtype is None else found.astype(dtype)
