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
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.serve import openvino_graphs
from drnet_jax.serve.engines import INT8, GraphEngine, cores, full_name

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

  With `share` all sizes are one graph, see `openvino_graphs.merged`.

  Raises:
    UserError: OpenVINO is not installed, or the processor lacks the precision.
  """

  def __init__(
    self,
    folder: str,
    contract: Contract,
    *,
    precision: str,
    batch: int,
    share: bool = False,
  ):
    there = [name for ability, name in _ABILITIES if ability in abilities()]
    if precision not in (*there, 'f32', INT8):
      raise UserError(
        f'precision = {precision!r}: this processor has {", ".join(there)} only'
      )
    # What is not in int8 in such graphs is computed as fast as it can be.
    rest = precisions(abilities())[0] if precision == INT8 else precision
    of_paths = functools.partial(networks, precision=rest, share=share)
    super().__init__(folder, contract, of_paths)
    self.name = full_name('openvino', precision)
    self.best_batch = batch or 16
    # One for each core, fewer of those that are cut into pieces; and one that
    # waits for the first to be free.
    pieces = max(self.best_batch // _LEAST_BATCH, 1)
    self.in_flight = max(-(-cores() // pieces), 2) + 1


def networks(
  paths: Sequence[str], *, precision: str, share: bool = False
) -> list['Network']:
  """Exported graphs, to be run; with `share` as one, if they can be."""
  models = [core().read_model(path) for path in paths]  # mapped, not read
  found = openvino_graphs.merged(models) if share else None
  if found:
    graph = Graph(found[0], precision)
    return [Network(graph, values) for values in found[1]]
  if precision != 'f32':
    for model in models:
      openvino_graphs.resize_in_half(model)
  return [Network(Graph(model, precision)) for model in models]


class Graph:
  """Compiled when it is first run, and once for all sizes that share it.

  Args:
    model: with a batch of images as its first input.
    precision: to compute in.
  """

  def __init__(self, model: Any, precision: str):
    self.model = model
    self._precision = precision
    self._lock = threading.Lock()
    self._compiled: dict[str, Any] = {}

  def compiled(self, hint: str) -> Any:
    """For single images ('LATENCY'), or for many ('THROUGHPUT')."""
    with self._lock:
      if hint not in self._compiled:
        self._compiled[hint] = self._compile(hint)
      return self._compiled[hint]

  def _compile(self, hint: str) -> Any:
    model = self.model
    if hint == 'LATENCY':
      model = model.clone()  # constants are shared
      images = model.inputs[0]
      model.reshape({images: [1, *list(images.partial_shape)[1:]]})
    settings = {
      'PERFORMANCE_HINT': hint,
      'INFERENCE_PRECISION_HINT': self._precision,
      # Batches of several sizes run at once, each size with threads of its
      # own: pinned, those of two sizes may share a core while another is idle.
      'ENABLE_CPU_PINNING': False,
    }
    return core().compile_model(model, 'CPU', settings)


class Network:
  """A graph and what it is given beside the images: for one image, and many."""

  def __init__(self, graph: Graph, values: Sequence[np.ndarray] = ()):
    self.graph = graph
    self._values = values
    self._lock = threading.Lock()
    # Requests: one for a single image; for many one for each core, in turn,
    # with the answer that it is working on: the oldest is the first to be free.
    self._single: Any = None
    self._bulk: collections.deque | None = None

  def __call__(self, images: np.ndarray) -> Any:
    """[B, K] of uint8 [B, S, S, 3]; `numpy.asarray` waits."""
    with self._lock:
      if len(images) == 1:
        self._single = self._single or self._requests('LATENCY')[0]
        # A request is one caller's at a time, and its output the next one's.
        found = self._single.infer({0: images}, share_inputs=True)
        return next(iter(found.values()))
      if not self._bulk:
        requests = self._requests('THROUGHPUT')
        self._bulk = collections.deque([x, None] for x in requests)
      # Into how many pieces depends on nothing but their number: with its batch
      # the last digits of an answer may change.
      count = max(1, min(len(self._bulk), len(images) // _LEAST_BATCH))
      return _Joined([self._begin(x) for x in np.array_split(images, count)])

  def _requests(self, hint: str) -> list[Any]:
    """As many as run at once."""
    from openvino import Tensor

    compiled, count = self.graph.compiled(hint), 1
    if hint == 'THROUGHPUT':
      count = compiled.get_property('OPTIMAL_NUMBER_OF_INFER_REQUESTS')
    requests = [compiled.create_infer_request() for _ in range(count)]
    for request in requests:
      for i, value in enumerate(self._values, 1):
        request.set_input_tensor(i, Tensor(value, shared_memory=True))
    return requests

  def _begin(self, images: np.ndarray) -> '_Answer':
    oldest = self._bulk[0]
    self._bulk.rotate(-1)
    request, answer = oldest
    if answer is not None:
      answer.settle()
    request.start_async({0: images}, share_inputs=True)
    oldest[1] = _Answer(request, images)
    return oldest[1]


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
