# SPDX-License-Identifier: Apache-2.0
"""Inference of a network with exits: nothing is run after an image's exit."""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.run import workdir
from drnet_jax.serve.answers import (
  Failure,
  Prediction,
  answered,
  failure,
  likeliest,
)
from drnet_jax.serve.exit_budget import ExitCalibration, ExitPoint
from drnet_jax.serve.picture import Picture
from drnet_jax.serve.stages import StageEngine

_READ_AHEAD = 4  # batches decoded while others run


class EarlyExitClassifier:
  """A trained RANet, ready to classify; used as a `Classifier` is.

  Args:
    contract: of the model.
    engine: runs its stages.
    calibration: for `set_budget`; None where the model was not calibrated.
  """

  def __init__(
    self,
    contract: Contract,
    engine: StageEngine,
    calibration: ExitCalibration | None = None,
  ):
    self.contract = contract
    self.engine = engine
    self.calibration = calibration
    self.set_exit(engine.num_exits)

  @classmethod
  def of(
    cls,
    trained: workdir.Trained,
    *,
    decode: str,
    batches: Sequence[int],
    calibration: ExitCalibration | None,
  ) -> 'EarlyExitClassifier':
    """As `Classifier.of`."""
    contract = Contract.of(trained, decode=decode)
    return cls(contract, StageEngine(trained, batches=batches), calibration)

  # When images leave.

  def set_thresholds(self, thresholds: Sequence[float]) -> None:
    """Images leave at the first exit that is as confident as this.

    Args:
      thresholds: [E], on the largest probability; inf where none shall leave.
        At the last exit all do.
    """
    found = np.array(thresholds, np.float32)
    if found.shape != (self.engine.num_exits,) or np.isnan(found).any():
      raise UserError(
        f'{list(thresholds)} is not a threshold for each of '
        f'{self.engine.num_exits} exits'
      )
    found[-1] = -np.inf
    self._thresholds = found

  def set_exit(self, exit_number: int) -> None:
    """Lets every image leave at this exit from now on, numbered from 1."""
    exits = self.engine.num_exits
    if not 1 <= exit_number <= exits:
      raise UserError(f'exit {exit_number} is not one of 1 to {exits}')
    self.set_thresholds(
      np.where(np.arange(1, exits + 1) < exit_number, np.inf, -np.inf)
    )

  def set_budget(
    self,
    *,
    gmacs: float | None = None,
    ms: float | None = None,
    accuracy: float | None = None,
  ) -> ExitPoint:
    """Sets the thresholds for a budget; see `Classifier.set_budget`."""
    if self.calibration is None:
      raise UserError(
        'not calibrated: python -m drnet_jax calibrate --workdir=...'
      )
    point = self.calibration.find(gmacs=gmacs, ms=ms, accuracy=accuracy)
    self.set_point(point)
    return point

  def set_point(self, point: ExitPoint) -> None:
    """Turns the dial to a setting that its calibration has found."""
    self.set_thresholds(point.thresholds)

  def set_size(self, size_px: int) -> None:
    """Only for the one size that there is."""
    if size_px != self.contract.image_px:
      raise UserError(
        f'size {size_px} px: this network has exits instead of sizes; use '
        'set_exit (--exit)'
      )

  def stream(self, **_: Any) -> None:
    """Not for networks with exits."""
    raise UserError('a network with exits has no streams; use predict')

  # Many images, or one.

  def picture(self, source: Any) -> Picture:
    """An image, to be decoded as this model needs it; once if handed on."""
    if isinstance(source, Picture):
      return source
    return Picture(source, self.contract)

  def predict(
    self, images: Iterable[Any], *, top_k: int = 5, on_error: str = 'raise'
  ) -> list[Prediction | Failure]:
    """Classifies images; each leaves at its own exit.

    Images that go on wait for each other until a batch of their stage is full.
    Files are decoded meanwhile. A single image runs at once.

    Args:
      images: see `Classifier.predict`.
      top_k: classes in an answer's `top`.
      on_error: 'raise' a UserError that names the images that cannot be read,
        or 'return' a `Failure` in the place of each.

    Returns:
      One answer each, in order.
    """
    bulk = _Bulk(self.engine, self._thresholds, self._answer(top_k))
    return answered(lambda: bulk.run(enumerate(images), self._read), on_error)

  def _read(self, item: tuple[int, Any]) -> np.ndarray | Failure:
    try:
      return self.picture(item[1]).crop(self.contract.image_px)
    except Exception as error:  # a decoder may raise anything on rubbish
      return failure(*item, error)

  def _answer(self, top_k: int) -> Callable[[np.ndarray, int], Prediction]:
    """A function from probabilities and an exit's index to an answer."""
    contract = self.contract

    def answer(probabilities: np.ndarray, k: int) -> Prediction:
      return Prediction(
        **likeliest(probabilities, contract.class_names, top_k),
        size_px=contract.image_px,
        chosen_px=contract.image_px,
        gmacs=contract.gmacs[k],
        full_gmacs=contract.gmacs[-1],
        exit_number=k + 1,
      )

    return answer


class _Bulk:
  """One call of `predict`."""

  def __init__(
    self,
    engine: StageEngine,
    thresholds: np.ndarray,
    answer: Callable[[np.ndarray, int], Prediction],
  ):
    self._engine = engine
    self._thresholds = thresholds
    self._answer = answer
    self._pools = [engine.pool(k) for k in range(1, engine.num_exits)]
    self._answers: dict[int, Prediction | Failure] = {}

  def run(
    self,
    sources: Iterable[tuple[int, Any]],
    read: Callable[[tuple[int, Any]], np.ndarray | Failure],
  ) -> list[Prediction | Failure]:
    sources = iter(sources)
    first = list(itertools.islice(sources, 2))
    if len(first) < 2:
      # Nothing to overlap: no threads.
      self._begin([(i, read((i, source))) for i, source in first])
    else:
      self._read_ahead(itertools.chain(first, sources), read)
    for pool in self._pools:
      while pool.waiting:
        self._go_on(pool)
    return [self._answers[i] for i in range(len(self._answers))]

  def _read_ahead(self, sources, read) -> None:
    batch = self._engine.best_batch
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:

      def begin(count: int):
        return [
          (item[0], threads.submit(read, item))
          for item in itertools.islice(sources, count)
        ]

      reading = begin(_READ_AHEAD * batch)
      while reading:
        now, reading = reading[:batch], reading[batch:]
        reading += begin(batch)
        self._begin([(i, future.result()) for i, future in now])

  def _begin(self, items: list[tuple[int, np.ndarray | Failure]]) -> None:
    """Runs the first stage."""
    good = [(i, x) for i, x in items if not isinstance(x, Failure)]
    self._answers |= {i: x for i, x in items if isinstance(x, Failure)}
    if good:
      images = self._engine.pad(np.stack([x for _, x in good]))
      self._run(0, images, [i for i, _ in good])

  def _go_on(self, pool) -> None:
    state, indices = pool.pop()
    self._run(pool.exit_index, state, indices)

  def _run(self, k: int, state: Any, indices: list[int]) -> None:
    """Runs a stage; some images leave, the others join the next pool."""
    probabilities, state = self._engine.run(k, state)
    rows = np.asarray(probabilities)[: len(indices)]
    leave = ~(rows.max(1) < self._thresholds[k])  # NaN is told, not passed on
    for row in np.flatnonzero(leave):
      self._answers[indices[row]] = self._answer(rows[row], k)
    on = np.flatnonzero(~leave)
    if not len(on):
      return
    if len(indices) == 1 and self._engine.bucket(1) == 1:
      self._run(k + 1, state, indices)  # alone: nobody to wait for
      return
    pool = self._pools[k]
    pool.push(state, on, [indices[row] for row in on])
    while len(pool.waiting) >= self._engine.best_batch:
      self._go_on(pool)
