# SPDX-License-Identifier: Apache-2.0
"""The budget dial: one checkpoint, any average cost.

A size is chosen by argmax_j(log p_j - lambda C_j). Lambda 0 is the trained
router; a larger one saves, a negative one spends. Which lambda gives which
average cost and accuracy is read off images that were not trained on
(`calibrate`), so a budget is asked for by what it should be: multiply-adds,
milliseconds of a machine, or accuracy.

Where many images change their size at the same lambda no lambda may give the
budget asked for; then a share of the images, picked by a checksum of their
pixels, takes the next one. The same image is always treated alike.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from drnet_jax import settings
from drnet_jax.errors import UserError
from drnet_jax.report import policies
from drnet_jax.report.policies import Record

FILE = 'calibration.json'
_MOST_IMAGES = 10_000
_GRID = 256  # lambdas among which an accuracy is looked for


class Policy(Protocol):
  """Chooses sizes.

  Called with log p [B, R] (None where it needs no predictor) and the B views
  of the images; returns int [B].
  """

  needs_predictor: bool

  def __call__(
    self, log_p: np.ndarray | None, views: Sequence[np.ndarray | None]
  ) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Fixed:
  """Every image at the same size.

  Attributes:
    size_index: which.
  """

  size_index: int
  needs_predictor = False

  def __call__(self, log_p, views) -> np.ndarray:
    return np.full(len(views), self.size_index)


@dataclasses.dataclass(frozen=True)
class Dial:
  """argmax(log p - lambda C), with `high` for lambda on a share of the images.

  Attributes:
    costs: C, one per size.
    low, high: lambdas, in 1 / the unit of C.
    share: of the images that take `high`.
  """

  costs: tuple[float, ...]
  low: float
  high: float
  share: float
  needs_predictor = True

  def __call__(self, log_p, views) -> np.ndarray:
    choice = choose(log_p, self.low, self.costs)
    if not self.share:
      return choice
    other = choose(log_p, self.high, self.costs)
    for i in np.flatnonzero(choice != other):
      if zlib.crc32(views[i]) < self.share * 2**32:
        choice[i] = other[i]
    return choice


def choose(log_p: np.ndarray, penalty: float, costs) -> np.ndarray:
  """argmax(log p - penalty * costs), int [N]; the smallest of equal sizes.

  Args:
    log_p: [N, R].
    penalty: lambda.
    costs: [R], ascending.
  """
  scores = log_p.astype(np.float64) - penalty * np.asarray(costs, np.float64)
  return scores.argmax(-1)


@dataclasses.dataclass(frozen=True)
class Costs:
  """What an image costs.

  Attributes:
    unit: 'GMACs' or 'ms'.
    sizes: of the base network at each size.
    predictor: of the predictor.
    source: how it was found.
  """

  unit: str
  sizes: tuple[float, ...]
  predictor: float
  source: str


@dataclasses.dataclass(frozen=True)
class Point:
  """A setting of the dial and what it gives on the calibration images.

  Attributes:
    dial: the setting.
    unit: of `cost`.
    cost: average of an image, predictor counted.
    gmacs: the same in 1e9 multiply-adds.
    top1: share classified correctly.
    shares: of the images at each size, [R].
  """

  dial: Dial
  unit: str
  cost: float
  gmacs: float
  top1: float
  shares: tuple[float, ...]


class Calibration:
  """What the networks said of images that were not trained on.

  Args:
    log_p: [N, R], the predictor's.
    correct: bool [N, R], whether each size classifies the image correctly.
    gmacs: cost table.
    ms: cost table, or None where this machine was not measured.
    split: which images.
  """

  def __init__(
    self,
    log_p: np.ndarray,
    correct: np.ndarray,
    gmacs: Costs,
    ms: Costs | None,
    split: str,
  ):
    # What is stored is what counts, so that a dial read back is the same dial.
    self.log_p = np.round(log_p.astype(np.float64), 6)
    self.correct = correct
    self.gmacs = gmacs
    self.ms = ms
    self.split = split

  @classmethod
  def of(cls, record: Record, *, split: str) -> 'Calibration':
    """From the record of a held-out split, or as much of it as is useful."""
    if record.log_p is None:
      raise UserError('there is no trained predictor to calibrate')
    gmacs = Costs(
      'GMACs',
      tuple(record.gmacs.tolist()),
      record.predictor_gmacs,
      'multiply-adds of the jaxpr',
    )
    some = slice(_MOST_IMAGES)
    return cls(record.log_p[some], record.top1[some], gmacs, None, split)

  def find(
    self,
    *,
    gmacs: float | None = None,
    ms: float | None = None,
    accuracy: float | None = None,
  ) -> Point:
    """The dial for a budget; see `Classifier.set_budget`."""
    costs, asked = counted_in(self, gmacs=gmacs, ms=ms, accuracy=accuracy)
    if costs is None:
      return self._cheapest(asked)
    return self._meet(costs, asked - costs.predictor)

  def points(self, costs: Costs, count: int) -> list[Point]:
    """Settings evenly spread from the cheapest size to the dearest."""
    budgets = np.linspace(min(costs.sizes), max(costs.sizes), count)
    return [self._meet(costs, budget) for budget in budgets]

  def at(self, costs: Costs, penalty: float) -> Point:
    """The setting with this lambda for all images."""
    return self._point(costs, penalty, penalty, 0.0)

  def _lambdas(self, costs: Costs) -> np.ndarray:
    """Ascending, one between any two at which some image changes its size."""
    table = np.asarray(costs.sizes)
    pairs = [
      (i, j)
      for i in range(len(table))
      for j in range(i)
      if table[i] != table[j]
    ]
    turns = np.unique(
      [
        (self.log_p[:, i] - self.log_p[:, j]) / (table[i] - table[j])
        for i, j in pairs
      ]
    )
    ends = turns[[0, -1]] + np.array([-1, 1]) / np.ptp(table)
    return np.concatenate([ends[:1], (turns[1:] + turns[:-1]) / 2, ends[1:]])

  def _meet(self, costs: Costs, budget: float) -> Point:
    """The dial whose average cost of the base network is the budget."""
    table, lambdas = np.asarray(costs.sizes), self._lambdas(costs)

    def cost(i: int) -> float:
      return table[choose(self.log_p, lambdas[i], table)].mean()

    # The cost falls as lambda grows: cost(low) >= budget > cost(high).
    low, high = 0, len(lambdas) - 1
    if cost(high) >= budget:
      low = high
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (middle, high) if cost(middle) >= budget else (low, middle)
    above, below = cost(low), cost(high)
    share = (above - budget) / (above - below) if above > below else 0.0
    return self._point(
      costs, lambdas[low], lambdas[high], float(np.clip(share, 0, 1))
    )

  def _cheapest(self, accuracy: float) -> Point:
    lambdas = self._lambdas(self.gmacs)
    grid = np.unique(
      lambdas[np.linspace(0, len(lambdas) - 1, _GRID).astype(int)]
    )
    return cheapest([self.at(self.gmacs, x) for x in grid], accuracy)

  def _point(
    self, costs: Costs, low: float, high: float, share: float
  ) -> Point:
    rows = np.arange(len(self.log_p))
    shares, top1 = np.zeros(len(costs.sizes)), 0.0
    for penalty, weight in ((low, 1 - share), (high, share)):
      choice = choose(self.log_p, penalty, costs.sizes)
      shares += weight * np.bincount(choice, minlength=len(shares)) / len(rows)
      top1 += weight * self.correct[rows, choice].mean()
    return Point(
      dial=Dial(costs.sizes, float(low), float(high), share),
      unit=costs.unit,
      cost=float(shares @ costs.sizes + costs.predictor),
      gmacs=float(shares @ self.gmacs.sizes + self.gmacs.predictor),
      top1=float(top1),
      shares=tuple(shares.tolist()),
    )

  def score(self, point: Point, record: Record) -> policies.Policy:
    """What a setting gives on other images, in expectation.

    Args:
      point: the setting; the record holds no pixels to draw its mixture by.
      record: of the images.
    """
    shares, top1, top5 = np.zeros(len(record.gmacs)), 0.0, 0.0
    dial, rows = point.dial, np.arange(len(record.label))
    for penalty, weight in (
      (dial.low, 1 - dial.share),
      (dial.high, dial.share),
    ):
      choice = choose(record.log_p, penalty, dial.costs)
      shares += weight * np.bincount(choice, minlength=len(shares)) / len(rows)
      top1 += weight * record.top1[rows, choice].mean()
      top5 += weight * record.top5[rows, choice].mean()
    gmacs = float(shares @ record.gmacs + record.predictor_gmacs)
    return policies.Policy(
      'budget dial', gmacs, float(top1), float(top5), shares
    )

  def to_json(self) -> dict[str, Any]:
    """As plain lists and numbers."""
    return {
      'split': self.split,
      'gmacs': dataclasses.asdict(self.gmacs),
      'ms': self.ms and dataclasses.asdict(self.ms),
      'correct': [''.join('01'[int(c)] for c in row) for row in self.correct],
      'log_p': self.log_p.tolist(),
    }

  def write(self, folder: str) -> str:
    """Writes `calibration.json` and returns its path."""
    return write(folder, self.to_json())


def counted_in(
  calibration: Any,
  *,
  gmacs: float | None,
  ms: float | None,
  accuracy: float | None,
) -> tuple[Costs | None, float]:
  """What a budget is counted in, and how much it is.

  Args:
    calibration: of any kind: its `gmacs` and `ms` are the costs.
    gmacs, ms, accuracy: the budget; all but one are None.

  Returns:
    The costs, None for an accuracy; and the number given.

  Raises:
    UserError: not one budget, or out of reach.
  """
  given = [x for x in (gmacs, ms, accuracy) if x is not None]
  if len(given) != 1:
    raise UserError('give one budget: gmacs, ms or accuracy')
  (asked,) = given
  if accuracy is not None:
    return None, asked
  costs = calibration.gmacs if ms is None else calibration.ms
  if costs is None:
    raise UserError(
      'no milliseconds were measured: python -m drnet_jax calibrate '
      '--workdir=... --measure=jax'
    )
  low, high = (f(costs.sizes) + costs.predictor for f in (min, max))
  if not low <= asked <= high:
    raise UserError(
      f'a budget of {asked:g} {costs.unit} is out of reach: choose between '
      f'{low:.4g} (all images at the cheapest) and {high:.4g} (all at the '
      'dearest)' + ', predictor counted' * bool(costs.predictor)
    )
  return costs, asked


def cheapest(points: Sequence[Any], accuracy: float) -> Any:
  """The cheapest of some settings that are accurate enough.

  Raises:
    UserError: none is.
  """
  enough = [point for point in points if point.top1 >= accuracy]
  if not enough:
    best = max(point.top1 for point in points)
    raise UserError(
      f'an accuracy of {accuracy:.4g} is out of reach: on the calibration '
      f'images the best is {best:.4g}'
    )
  return min(enough, key=lambda point: point.cost)


def write(folder: str, fields: dict[str, Any]) -> str:
  """Writes `calibration.json` and returns its path."""
  path = os.path.join(folder, FILE)
  settings.write_json(path, fields)
  return path


def read(
  folder: str, parse: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
  """Reads what `Calibration.write` left in a folder, if anything.

  Args:
    folder: a workdir, or an export.
    parse: makes a calibration of its fields; default `read_json`.

  Raises:
    UserError: the file is damaged.
  """
  path = os.path.join(folder, FILE)
  if not os.path.exists(path):
    return None
  try:
    with open(path) as file:
      return (parse or read_json)(json.load(file))
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged ({error}): calibrate again') from error


def read_json(fields: dict[str, Any]) -> Calibration:
  """Inverse of `Calibration.to_json`."""
  return Calibration(
    log_p=np.asarray(fields['log_p']),
    correct=np.asarray([[c == '1' for c in row] for row in fields['correct']]),
    gmacs=costs_from_json(fields['gmacs']),
    ms=fields['ms'] and costs_from_json(fields['ms']),
    split=fields['split'],
  )


def costs_from_json(fields: dict[str, Any]) -> Costs:
  """Inverse of `dataclasses.asdict`."""
  return Costs(**fields | {'sizes': tuple(fields['sizes'])})
