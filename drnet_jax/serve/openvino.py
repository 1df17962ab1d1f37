# SPDX-License-Identifier: Apache-2.0
"""Exported ONNX graphs in OpenVINO, on the CPU.

A single image has all threads to itself, in a program for a batch of one. Many
share the cores: each core has a batch of its own, without a word to the others.
A program is compiled when it is first run, so that neither time nor memory goes
to sizes, or ways to run them, that nobody asks for.
"""

import collections
import concurrent.futures
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
  resize = openvino_graphs.resize_in_half
  if precision == 'f32':
    resize = openvino_graphs.resize_in_blocks
  for model in models:
    resize(model)
  return [
    Network(Graph(model, precision, openvino_graphs.at_once(model, precision)))
    for model in models
  ]


class Graph:
  """Compiled when it is first run, and once for all sizes that share it.

  Args:
    model: with a batch of images as its first input.
    precision: to compute in.
    at_once: how many of many images a core is given, in a program for just as
      many; None for as many as come.
  """

  def __init__(self, model: Any, precision: str, at_once: int | None = None):
    self.model, self.at_once = model, at_once
    self._precision = precision
    self._lock = threading.Lock()
    self._compiled: dict[int, Any] = {}

  def compiled(self, count: int) -> Any:
    """For so many images: one has all cores, of more each core has some."""
    count = self.kind(count)
    with self._lock:
      if count not in self._compiled:
        self._compiled[count] = self._compile(count)
      return self._compiled[count]

  def kind(self, count: int) -> int:
    """How many images the program for so many is for; -1 for any number."""
    return count if count in (1, self.at_once) else -1

  def _compile(self, count: int) -> Any:
    model = self.model
    if count > 0:
      model = model.clone()  # constants are shared
      images = model.inputs[0]
      model.reshape({images: [count, *list(images.partial_shape)[1:]]})
    settings = {
      'PERFORMANCE_HINT': 'LATENCY' if count == 1 else 'THROUGHPUT',
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
    # Requests that nobody waits for, by the number of images they are for.
    self._free = collections.defaultdict(collections.deque)

  def __call__(self, images: np.ndarray) -> Any:
    """[B, K] of uint8 [B, S, S, 3]; `numpy.asarray` waits."""
    if len(images) == 1:
      with self._lock:  # all cores are one image's at a time
        return self._run(images)
    return _Joined([_cores().submit(self._run, x) for x in self._parts(images)])

  def _parts(self, images: np.ndarray) -> list[np.ndarray]:
    """A batch, in parts for a core each.

    Which these are depends on nothing but the number of images: with its batch
    the last digits of an answer may change.
    """
    if at_once := self.graph.at_once:
      return np.split(images, range(at_once, len(images), at_once))
    count = max(1, min(cores(), len(images) // _LEAST_BATCH))
    return np.array_split(images, count)

  def _run(self, images: np.ndarray) -> np.ndarray:
    """[B, K], on the core that this thread stands for."""
    free = self._free[self.graph.kind(len(images))]
    try:
      request = free.pop()
    except IndexError:
      request = self._request(len(images))
    found = request.infer({0: images}, share_inputs=True)
    free.append(request)
    return next(iter(found.values()))  # a copy

  def _request(self, count: int) -> Any:
    from openvino import Tensor

    request = self.graph.compiled(count).create_infer_request()
    for i, value in enumerate(self._values, 1):
      request.set_input_tensor(i, Tensor(value, shared_memory=True))
    return request


@functools.cache
def _cores() -> concurrent.futures.ThreadPoolExecutor:
  """A thread for each core, for the parts of all sizes and networks."""
  return concurrent.futures.ThreadPoolExecutor(cores(), 'openvino')


class _Joined:
  """The answers to the parts of a batch, as one array."""

  def __init__(self, parts: list[concurrent.futures.Future]):
    self._parts = parts

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    found = np.concatenate([part.result() for part in self._parts])
    return found if dtype is None else found.astype(dtype)
