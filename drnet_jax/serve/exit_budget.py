# SPDX-License-Identifier: Apache-2.0
"""The budget dial of a network with exits: thresholds for any average cost.

One number, the ratio of the shares that leave at consecutive exits, makes all
thresholds on images that were not trained on (`report.exits`); the larger, the
later images leave. A budget is met by the largest ratio that keeps within it.
"""

import dataclasses
from typing import Any

import numpy as np

from drnet_jax.report import exits
from drnet_jax.report.policies import Policy, Record
from drnet_jax.serve import budget
from drnet_jax.serve.budget import Calibration, Costs

_MOST_IMAGES = 50_000
_DIGITS = 7  # kept of a confidence: as many as a float32 has
_EXTREMES = (1e-6, 1e6)  # ratios at which all leave at the first or last exit
_STEPS = 60  # of bisection
_GRID = 200  # ratios among which an accuracy is looked for


@dataclasses.dataclass(frozen=True)
class ExitPoint:
  """A setting of the dial and what it gives on the calibration images.

  Attributes:
    thresholds: [E], see `report.exits`.
    unit: of `cost`.
    cost: average of an image.
    gmacs: the same in 1e9 multiply-adds.
    top1: share classified correctly.
    shares: of the images at each exit, [E].
  """

  thresholds: tuple[float, ...]
  unit: str
  cost: float
  gmacs: float
  top1: float
  shares: tuple[float, ...]


class ExitCalibration:
  """What the exits said of images that were not trained on.

  Args:
    confidence: [N, E].
    correct: bool [N, E].
    gmacs: cost up to each exit.
    ms: the same in milliseconds, or None where this machine was not measured.
    split: which images.
  """

  kind = 'exits'

  def __init__(
    self,
    confidence: np.ndarray,
    correct: np.ndarray,
    gmacs: Costs,
    ms: Costs | None,
    split: str,
  ):
    # What is stored is what counts, so that a dial read back is the same dial.
    # Rounded down, so that an image passes the threshold that it set; but not
    # down again if it is rounded already.
    scaled = np.asarray(confidence, np.float64) * 10**_DIGITS
    self.confidence = np.floor(scaled + 1e-3) / 10**_DIGITS
    self.correct = correct
    self.gmacs = gmacs
    self.ms = ms
    self.split = split

  @classmethod
  def of(cls, record: Record, *, split: str) -> 'ExitCalibration':
    """From the record of a held-out split, or as much of it as is useful."""
    gmacs = Costs(
      'GMACs', tuple(record.gmacs.tolist()), 0.0, "as the paper's authors count"
    )
    some = slice(_MOST_IMAGES)
    return cls(record.confidence[some], record.top1[some], gmacs, None, split)

  def find(
    self,
    *,
    gmacs: float | None = None,
    ms: float | None = None,
    accuracy: float | None = None,
  ) -> ExitPoint:
    """The thresholds for a budget; see `Classifier.set_budget`."""
    costs, asked = budget.counted_in(
      self, gmacs=gmacs, ms=ms, accuracy=accuracy
    )
    if costs is None:
      grid = np.geomspace(*_EXTREMES, _GRID)
      return budget.cheapest([self.at(self.gmacs, q) for q in grid], asked)
    return self._within(costs, asked)

  def points(self, costs: Costs, count: int) -> list[ExitPoint]:
    """Settings within budgets from the first exit's cost to the last's."""
    budgets = np.linspace(costs.sizes[0], costs.sizes[-1], count)
    return [self._within(costs, asked) for asked in budgets]

  def at(self, costs: Costs, ratio: float) -> ExitPoint:
    """The setting with this ratio."""
    shares = exits.geometric_shares(ratio, len(costs.sizes))
    return self._point(costs, exits.thresholds(self.confidence, shares))

  def _within(self, costs: Costs, asked: float) -> ExitPoint:
    low, high = np.log(_EXTREMES)
    if self.at(costs, np.exp(high)).cost <= asked:
      return self.at(costs, np.exp(high))
    found = self._point(costs, np.full(len(costs.sizes), -np.inf))
    for _ in range(_STEPS):
      middle = (low + high) / 2
      point = self.at(costs, np.exp(middle))
      if point.cost <= asked:
        low, found = middle, point
      else:
        high = middle
    return found

  def _point(self, costs: Costs, thresholds: np.ndarray) -> ExitPoint:
    left_at = exits.leave_at(self.confidence, thresholds)
    shares = np.bincount(left_at, minlength=len(costs.sizes)) / len(left_at)
    return ExitPoint(
      thresholds=tuple(thresholds.tolist()),
      unit=costs.unit,
      cost=float(shares @ costs.sizes),
      gmacs=float(shares @ self.gmacs.sizes),
      top1=float(self.correct[np.arange(len(left_at)), left_at].mean()),
      shares=tuple(shares.tolist()),
    )

  def score(self, point: ExitPoint, record: Record) -> Policy:
    """What a setting gives on other images."""
    return exits.score(
      np.asarray(point.thresholds),
      record.gmacs,
      record.confidence,
      record.top1,
      record.top5,
    )

  def to_json(self) -> dict[str, Any]:
    """As plain lists and numbers."""
    return {
      'kind': self.kind,
      'split': self.split,
      'gmacs': dataclasses.asdict(self.gmacs),
      'ms': self.ms and dataclasses.asdict(self.ms),
      'correct': [''.join('01'[int(c)] for c in row) for row in self.correct],
      'confidence': self.confidence.tolist(),
    }

  def write(self, folder: str) -> str:
    """Writes `calibration.json` and returns its path."""
    return budget.write(folder, self.to_json())

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> 'ExitCalibration':
    """Inverse of `to_json`."""
    return cls(
      confidence=np.asarray(fields['confidence']),
      correct=np.asarray(
        [[c == '1' for c in row] for row in fields['correct']]
      ),
      gmacs=budget.costs_from_json(fields['gmacs']),
      ms=fields['ms'] and budget.costs_from_json(fields['ms']),
      split=fields['split'],
    )


def read(folder: str) -> Calibration | ExitCalibration | None:
  """Reads the calibration in a folder, of whichever kind, if there is one.

  Raises:
    UserError: the file is damaged.
  """

  def parse(fields: dict[str, Any]) -> Calibration | ExitCalibration:
    if fields.get('kind') == ExitCalibration.kind:
      return ExitCalibration.from_json(fields)
    return budget.read_json(fields)

  return budget.read(folder, parse)
