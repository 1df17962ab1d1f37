# SPDX-License-Identifier: Apache-2.0
"""Inference that runs each image at its chosen size, and at no other.

classifier = Classifier.load('runs/quickstart')
classifier.predict(['photo.jpg'])[0].name             # one: least latency
classifier.predict(glob.glob('album/*'))              # many: throughput
classifier.set_budget(gmacs=0.005)                    # after `calibrate`
with classifier.stream(deadline_ms=50) as stream:     # as they arrive
  future = stream.submit(data)
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from drnet_jax import mesh as mesh_lib
from drnet_jax.errors import UserError
from drnet_jax.export import package
from drnet_jax.export.contract import Contract
from drnet_jax.models.ranet import RANet
from drnet_jax.run import workdir
from drnet_jax.serve import budget, engines, exit_budget
from drnet_jax.serve.answers import (
  Failure,
  Prediction,
  answered,
  failure,
  likeliest,
)
from drnet_jax.serve.early_exit import EarlyExitClassifier
from drnet_jax.serve.engines import Engine, OnnxEngine, XlaEngine
from drnet_jax.serve.picture import Picture
from drnet_jax.serve.streaming import Stream

RUNTIMES = ('jax', 'onnx', 'stablehlo')
_CPU_BATCH, _ACCELERATOR_BATCH = 16, 128
# Exits have many small operations, each with a start of its own; so small
# images run in larger batches, of this many pixels.
_CPU_EXIT_PIXELS = 2**15
_POOL_BATCHES = 4  # images the predictor sees at once, in batches
# Batches whose results nobody has fetched: enough to keep a device busy.
_IN_FLIGHT = 4


@dataclasses.dataclass
class _Item:
  """An image on its way: what is known of it so far."""

  index: int
  source: Any
  picture: Picture
  view: np.ndarray | None = None
  crop: Callable[[], np.ndarray] | None = None
  failure: Failure | None = None


class Classifier:
  """A trained model, ready to classify.

  Args:
    contract: of the model.
    engine: runs its networks.
    calibration: for `set_budget`; None where the model was not calibrated.

  Attributes:
    policy: chooses the sizes. As trained, until it is set: by `set_budget`,
      `set_size`, or to any `budget.Policy`.
  """

  def __init__(
    self,
    contract: Contract,
    engine: Engine,
    calibration: budget.Calibration | None = None,
  ):
    self.contract = contract
    self.engine = engine
    self.calibration = calibration
    self.policy: budget.Policy = (
      budget.Dial(contract.gmacs, 0.0, 0.0, 0.0)
      if contract.has_router
      else budget.Fixed(len(contract.resolutions) - 1)
    )

  @classmethod
  def load(
    cls,
    path: str,
    *,
    runtime: str = 'jax',
    decode: str | None = None,
    batch: int = 0,
  ) -> 'Classifier | EarlyExitClassifier':
    """Reads a model and makes it ready; nothing is compiled after this.

    Args:
      path: workdir of a run (its latest weights), one of its checkpoints
        (`<workdir>/checkpoints/<stage>/<step>`), or a folder that `export`
        wrote.
      runtime: 'jax'; 'onnx', which is faster on CPUs (a workdir is exported
        to a temporary folder); 'stablehlo', the exported programs, for
        checking them.
      decode: see `Contract`; default 'full', or what a folder was exported
        for.
      batch: images that are run at once where there are many; 0 for what suits
        the device.

    Raises:
      UserError: no model, or a runtime that is not installed.
    """
    if runtime not in RUNTIMES:
      raise UserError(f'runtime = {runtime!r} is not one of {RUNTIMES}')
    if os.path.exists(os.path.join(path, package.CONTRACT)):
      if runtime == 'jax':
        raise UserError(
          f"{path} was exported: run it with runtime 'onnx' or 'stablehlo'"
        )
      exported = cls._of_folder(path, runtime, batch)
      if decode not in (None, exported.contract.decode):
        raise UserError(
          f'{path} was exported for decode={exported.contract.decode}: export '
          f'it again with --decode={decode}'
        )
      return exported
    return cls.of(
      workdir.load(path, mesh_lib.create(1)),
      runtime=runtime,
      decode=decode or 'full',
      batch=batch,
      calibration=exit_budget.read(workdir.root(path)),
    )

  @classmethod
  def of(
    cls,
    trained: workdir.Trained,
    *,
    runtime: str = 'jax',
    decode: str = 'full',
    batch: int = 0,
    calibration: Any = None,
  ) -> 'Classifier | EarlyExitClassifier':
    """As `load`, of a model that is in memory.

    Raises:
      UserError: weights that are not finite.
    """
    # Not left to the answers: XLA does not always hand a NaN on.
    weights = jax.tree.leaves((trained.params, trained.batch_stats))
    if not all(np.isfinite(x).all() for x in weights):
      raise UserError(f'{trained.origin}: the weights hold NaN or infinity')
    if isinstance(trained.model, RANet):
      if runtime != 'jax':
        raise UserError(
          f"runtime = {runtime!r}: a network with exits runs in 'jax' only"
        )
      image_pixels = trained.model.image_px**2
      cpu_batch = max(_CPU_BATCH, _CPU_EXIT_PIXELS // image_pixels)
      return EarlyExitClassifier.of(
        trained,
        decode=decode,
        batches=_buckets(batch, cpu_batch),
        calibration=calibration,
      )
    contract = Contract.of(trained, decode=decode)
    if runtime == 'jax':
      made = engines.programs(trained, contract)
      engine = XlaEngine('jax', made, contract, batches=_buckets(batch))
      return cls(contract, engine, calibration)
    with tempfile.TemporaryDirectory() as folder:
      package.write(
        folder, trained, contract, calibration=None, formats=(runtime,)
      )
      exported = cls._of_folder(folder, runtime, batch)
    return cls(contract, exported.engine, calibration)

  @classmethod
  def _of_folder(cls, folder: str, runtime: str, batch: int) -> 'Classifier':
    with open(os.path.join(folder, package.CONTRACT)) as file:
      fields = json.load(file)
    if runtime not in fields['formats']:
      raise UserError(
        f'{folder} was exported to {", ".join(fields["formats"])} only, not to '
        f'{runtime}'
      )
    contract = Contract.from_json(fields)
    engine: Engine
    if runtime == 'onnx':
      engine = OnnxEngine(folder, contract)
      engine.best_batch = batch or engine.best_batch
    else:
      made = engines.exported_programs(
        folder, contract, fields['stablehlo_weights']
      )
      engine = XlaEngine('stablehlo', made, contract, batches=_buckets(batch))
    return cls(contract, engine, budget.read(folder))

  # How sizes are chosen.

  def set_budget(
    self,
    *,
    gmacs: float | None = None,
    ms: float | None = None,
    accuracy: float | None = None,
  ) -> budget.Point:
    """Turns the dial: sizes are chosen by log p - lambda * cost from now on.

    Args:
      gmacs: average cost of an image in 1e9 multiply-adds, predictor counted.
      ms: the same in milliseconds, by the costs that `measure` stored.
      accuracy: top-1 in [0, 1]; the cheapest lambda that reaches it on the
        calibration images.

    Returns:
      What the calibration images promise.

    Raises:
      UserError: not calibrated, or out of reach.
    """
    if not self.contract.has_router:
      raise UserError('this model has no predictor: use set_size')
    if self.calibration is None:
      raise UserError(
        'not calibrated: python -m drnet_jax calibrate --workdir=...'
      )
    point = self.calibration.find(gmacs=gmacs, ms=ms, accuracy=accuracy)
    self.set_point(point)
    return point

  def set_point(self, point: budget.Point) -> None:
    """Turns the dial to a setting that its calibration has found."""
    self.policy = point.dial

  def set_size(self, size_px: int) -> None:
    """Runs every image at this size from now on, without a predictor."""
    sizes = self.contract.resolutions
    if size_px not in sizes:
      raise UserError(f'size {size_px} px is not one of {sizes}')
    self.policy = budget.Fixed(sizes.index(size_px))

  def set_exit(self, exit_number: int) -> None:
    """Only for networks with exits."""
    raise UserError(
      f'exit {exit_number}: this network has sizes instead of exits; use '
      'set_size (--size)'
    )

  # Many images, or one.

  def predict(
    self, images: Iterable[Any], *, top_k: int = 5, on_error: str = 'raise'
  ) -> list[Prediction | Failure]:
    """Classifies images, each at its own size.

    The predictor runs over a pool of images; those that chose the same size
    wait for each other until a batch is full. Files are decoded meanwhile. A
    single image runs at once, in programs for a batch of one.

    Args:
      images: paths, bytes, PIL images or arrays, see `Picture`, or what
        `picture` made of one; a generator will do, no more than a pool is held
        in memory.
      top_k: classes in an answer's `top`.
      on_error: 'raise' a UserError that names the images that cannot be read,
        or 'return' a `Failure` in the place of each.

    Returns:
      One answer each, in order.
    """
    return answered(lambda: _Bulk(self, top_k).run(images), on_error)

  def stream(
    self, *, deadline_ms: float, batch: int = 8, top_k: int = 5
  ) -> Stream:
    """Classifies images as they arrive; see `Stream`."""
    batch = min(batch, self.engine.best_batch)
    return Stream(self, deadline_ms=deadline_ms, batch=batch, top_k=top_k)

  # Parts, for streams and benchmarks.

  def picture(self, source: Any) -> Picture:
    """An image, to be decoded as this model needs it; once if handed on."""
    if isinstance(source, Picture):
      return source
    return Picture(source, self.contract)

  def view(self, picture: Picture) -> np.ndarray | None:
    """The crop for the predictor; None where the policy asks none."""
    if not self.policy.needs_predictor:
      return None
    contract = self.contract
    return picture.crop(contract.input_px(contract.predictor_px))

  def crop(self, picture: Picture, size_index: int) -> np.ndarray:
    """The crop for the network at a size."""
    contract = self.contract
    return picture.crop(contract.input_px(contract.resolutions[size_index]))

  def choose(self, views: Sequence[np.ndarray | None]) -> np.ndarray:
    """Indices of the sizes for some images, int [B]."""
    policy, log_p = self.policy, None
    if not views:
      return np.zeros(0, int)
    if policy.needs_predictor:
      most = self.engine.best_batch
      parts = [
        (views[i : i + most], self.engine.log_p(np.stack(views[i : i + most])))
        for i in range(0, len(views), most)
      ]
      log_p = np.concatenate([np.asarray(y)[: len(x)] for x, y in parts])
    return policy(log_p, views)

  def answer(
    self, probabilities: np.ndarray, ran: int, chosen: int, top_k: int
  ) -> Prediction:
    """Puts a network's output into words.

    Args:
      probabilities: [K].
      ran: index of the size it was run at.
      chosen: index of the size that was chosen.
      top_k: classes to list.

    Raises:
      UserError: the network returns NaN.
    """
    contract = self.contract
    overhead = self.policy.needs_predictor * contract.predictor_gmacs
    return Prediction(
      **likeliest(probabilities, contract.class_names, top_k),
      size_px=contract.resolutions[ran],
      chosen_px=contract.resolutions[chosen],
      gmacs=contract.gmacs[ran] + overhead,
      full_gmacs=contract.gmacs[-1],
    )


class _Bulk:
  """One call of `predict`."""

  def __init__(self, classifier: Classifier, top_k: int):
    self._classifier = classifier
    self._top_k = top_k
    self._batch = classifier.engine.best_batch
    sizes = len(classifier.contract.resolutions)
    self._waiting: list[list[_Item]] = [[] for _ in range(sizes)]
    self._in_flight: collections.deque = collections.deque()
    self._answers: dict[int, Prediction | Failure] = {}

  def run(self, images: Iterable[Any]) -> list[Prediction | Failure]:
    sources = enumerate(images)
    first = list(itertools.islice(sources, 2))
    if len(first) < 2:
      # Nothing to overlap: no threads.
      self._route([self._read(i, source) for i, source in first])
    else:
      self._run_pools(itertools.chain(first, sources))
    for j, waiting in enumerate(self._waiting):
      if waiting:
        self._start(j, waiting)
    while self._in_flight:
      self._fetch()
    return [self._answers[i] for i in range(len(self._answers))]

  def _run_pools(self, sources) -> None:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:

      def begin():
        some = itertools.islice(sources, _POOL_BATCHES * self._batch)
        return [threads.submit(self._read, i, source) for i, source in some]

      pool = begin()
      while pool:
        following = begin()
        self._route([future.result() for future in pool], threads)
        pool = following

  def _read(self, i: int, source: Any) -> _Item:
    picture = self._classifier.picture(source)
    item = _Item(i, source, picture)
    try:
      item.view = self._classifier.view(picture)
    except Exception as error:  # a decoder may raise anything on rubbish
      item.failure = failure(i, source, error)
    return item

  def _route(self, items: list[_Item], threads=None) -> None:
    """Lets the predictor choose, and runs the batches that became full."""
    for item in items:
      if item.failure:
        self._answers[item.index] = item.failure
    items = [item for item in items if not item.failure]
    choice = self._classifier.choose([item.view for item in items])
    for item, j in zip(items, choice.tolist(), strict=True):
      item.view = None
      crop = functools.partial(self._classifier.crop, item.picture, j)
      item.crop = threads.submit(crop).result if threads else crop
      waiting = self._waiting[j]
      waiting.append(item)
      if len(waiting) == self._batch:
        self._start(j, waiting)
        self._waiting[j] = []

  def _start(self, j: int, items: list[_Item]) -> None:
    crops, good = [], []
    for item in items:
      try:
        crops.append(item.crop())
        good.append(item.index)
      except Exception as error:  # as above
        self._answers[item.index] = failure(item.index, item.source, error)
    if not good:
      return
    probabilities = self._classifier.engine.probabilities(j, np.stack(crops))
    self._in_flight.append((j, good, probabilities))
    if len(self._in_flight) > _IN_FLIGHT:
      self._fetch()

  def _fetch(self) -> None:
    j, indices, probabilities = self._in_flight.popleft()
    rows = np.asarray(probabilities)
    for i, row in zip(indices, rows, strict=False):  # the rest is padding
      self._answers[i] = self._classifier.answer(row, j, j, self._top_k)


def _buckets(batch: int, cpu_batch: int = _CPU_BATCH) -> list[int]:
  """Batch sizes to compile for: one, a full batch, and what is left over."""
  cpu = jax.default_backend() == 'cpu'
  batch = batch or (cpu_batch if cpu else _ACCELERATOR_BATCH)
  return sorted({1, max(batch // 4, 1), batch})
