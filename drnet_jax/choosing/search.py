# SPDX-License-Identifier: Apache-2.0
"""The best policy of each family for every budget, on held-out images.

A family's policies form a cloud of (cost, top-1). Its frontier, from the
cheapest to the most accurate, is found for one price of cost after another:
with all else given, the best threshold of an option is a cut through the images
that reach it, sorted by how sure their answer is. So thresholds are set in
turn, the last option's first, until no cut helps.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from drnet_jax.choosing import exit_shares, scores
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.options import FEW, MOST_TRIED, Costs
from drnet_jax.choosing.policy import AT_ONCE, Dial, Policy, decide
from drnet_jax.choosing.record import Record

_PRICES = np.geomspace(1e-3, 10, 48)  # top-1 for the cost of the full option
# Places among which a threshold is looked for, a few images apart: closer ones
# fit noise (on halves of 1,300 photographs 20 to 80 beat 200 by .1 points).
_IMAGES_PER_CUT = 10
_CUTS = (20, 200)  # at least, at most
_ROUNDS = 3
_DIALS = 16  # lambdas a routed cascade begins with
_BUDGETS = 64  # of a router's dial
_HOPELESS = 0.015  # top-1 under a cheaper option
_GAP = 0.004  # least difference in cost of two points, of the full option


@dataclasses.dataclass(frozen=True)
class Point:
  """A policy and what it gives on the images it was found on.

  Attributes:
    policy: the setting.
    cost: average of an image, in the unit of the search.
    gmacs: the same in 1e9 multiply-adds.
    top1: share classified correctly.
    shares: of the images that leave at each option, [R].
  """

  policy: Policy
  cost: float
  gmacs: float
  top1: float
  shares: tuple[float, ...]


def tried(record: Record, costs: Costs) -> dict[str, list[Point]]:
  """All policies that the search comes by, of each family that there can be.

  The router's first is the one as trained.

  The record is of images that were neither trained on nor will be reported.
  """
  routes = policy_lib.routes(record)
  found = {'fixed': [policy_lib.fixed(j) for j in range(len(record.options))]}
  if len(routes) > 1:
    dials = _dials(record, costs, routes, _BUDGETS)
    found['router'] = [
      policy_lib.router(costs, routes, **dial) for dial in ({}, *dials)
    ]
  if len(record.options) > 1:
    found['cascade'] = _cascades(record, costs)
  if len(routes) > 1:
    found['routed_cascade'] = _routed_cascades(record, costs, routes)
  return {k: [at(p, record, costs) for p in v] for k, v in found.items()}


def frontiers(
  every: dict[str, list[Point]], costs: Costs
) -> dict[str, list[Point]]:
  """Of what was `tried` the frontier of each family, and of all: 'best'."""
  points = {k: _pareto(v, costs) for k, v in every.items()}
  together = [point for several in points.values() for point in several]
  return points | {'best': _pareto(together, costs)}


def as_accurate(
  points: Iterable[Point], record: Record, tolerance: float
) -> Point | None:
  """The cheapest that is surely as accurate as every single option, if any.

  For each option the 95 % interval of what a policy gains over it on the images
  of the record lies above -`tolerance`, in top-1. Not only frontiers are worth
  asking: what hardly differs from an option is surer than what beats it.
  """
  least = record.top1.mean(0).max() - tolerance
  for point in sorted(points, key=lambda p: p.cost):
    if point.top1 >= least and _shortfall(point, record) <= tolerance:
      return point
  return None


def _shortfall(point: Point, record: Record) -> float:
  """Most that a policy may be below any other option, in top-1; see above."""
  right = decide(point.policy, record, record.costs).right
  groups, found = record.groups, 0.0
  least = 1 / (groups.max() + 1)  # where all agree, the next might not
  for j, option in enumerate(record.top1.T):
    if point.policy != policy_lib.fixed(j):
      lost = option.astype(float) - right
      error = scores.standard_error(lost - lost.mean(), groups)
      error = float(np.fmax(error, least))
      found = max(found, float(lost.mean()) + scores.Z * error)
  return found


def cascades(record: Record, costs: Costs) -> list[Point]:
  """The frontier of cascades alone."""
  points = (at(policy, record, costs) for policy in _cascades(record, costs))
  return _pareto(points, costs)


def within(points: Sequence[Point], budget: float) -> Point | None:
  """The best point of a frontier whose cost is within a budget, if any."""
  affordable = [p for p in points if p.cost <= budget * (1 + 1e-9)]
  return affordable[-1] if affordable else None


def at(policy: Policy, record: Record, costs: Costs) -> Point:
  """What a policy gives on a record."""
  score = scores.score(policy, record, '')
  cost = score.gmacs
  if costs.unit != record.costs.unit:
    cost = float(decide(policy, record, costs).cost.mean())
  shares = tuple(score.shares.tolist())
  return Point(policy, cost, score.gmacs, score.top1, shares)


def _pareto(points: Iterable[Point], costs: Costs) -> list[Point]:
  """Those that no cheaper one equals, thinned out; ascending."""
  found: list[Point] = []
  for point in sorted(points, key=lambda p: (p.cost, -p.top1)):
    if found and point.top1 <= found[-1].top1:
      continue
    # The first stays, for it is the cheapest, and so does the last.
    if len(found) > 1 and point.cost - found[-2].cost < _GAP * costs.full:
      found.pop()
    found.append(point)
  return found


def turns(log_p: np.ndarray, table: Sequence[float]) -> np.ndarray:
  """Lambdas, ascending: one between any two at which some image moves.

  The images are of `log_p` [N, P]; `table` [P] holds the options' costs.
  """
  moves = [
    (log_p[:, i] - log_p[:, j]) / (table[i] - table[j])
    for i, j in itertools.combinations(range(len(table)), 2)
    if table[i] != table[j]
  ]
  found = np.unique(moves)
  ends = found[[0, -1]] + np.array([-1, 1]) / np.ptp(table)
  return np.concatenate([ends[:1], (found[1:] + found[:-1]) / 2, ends[1:]])


def _dials(record, costs, routes, count: int, *, endpoint: bool = True):
  """Dials, as `met` gives them, of evenly spread costs."""
  table = np.asarray(costs.options)[list(routes)]
  log_p = record.log_p[:, routes].astype(np.float64)
  lambdas = turns(log_p, table)
  budgets = np.linspace(table.min(), table.max(), count, endpoint=endpoint)
  return [met(log_p, table, lambdas, budget) for budget in budgets]


def met(log_p, table, lambdas, budget: float) -> dict[str, float]:
  """Fields of the `Dial` whose average cost is a budget within the table.

  The predictor is left out; log_p, float64, and table are those that `turns`
  made the lambdas of.
  """

  def cost(i: int) -> float:
    return table[(log_p - lambdas[i] * table).argmax(-1)].mean()

  # The cost falls as lambda grows: cost(low) >= budget > cost(high).
  low, high = 0, len(lambdas) - 1
  if cost(high) >= budget:
    low = high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if cost(middle) >= budget else (low, middle)
  above, below = cost(low), cost(high)
  share = (above - budget) / (above - below) if above > below else 0.0
  return {
    'low': float(lambdas[low]),
    'high': float(lambdas[high]),
    'share': float(np.clip(share, 0, 1)),
  }


def _cascades(record: Record, costs: Costs) -> list[Policy]:
  found = []
  for path in paths(record, costs):
    found += _with_thresholds(record, costs, path)
  if record.options.noun == 'exit':
    # Last: of equals the first stays, and those above lie between two images.
    found += [exit_shares.by_ratio(record, q) for q in exit_shares.RATIOS]
  return found


def _routed_cascades(record, costs, routes) -> list[Policy]:
  costs_of_routes = tuple(costs.options[j] for j in routes)
  dials = _dials(record, costs, routes, _DIALS, endpoint=False)
  found = []
  for penalty in sorted({dial['low'] for dial in dials} | {0.0}):
    start = Dial(costs_of_routes, penalty, penalty)
    found += _with_thresholds(record, costs, routes, start)
  return found


def paths(record: Record, costs: Costs) -> list[tuple[int, ...]]:
  """Which options a cascade may try, in ascending order of cost.

  Of up to four options all subsets are tried, of more those of two and three
  that are not hopeless by themselves. No other option comes between two exits
  of a network: their features are handed on, and kept nowhere.
  """
  options, table = record.options, np.asarray(costs.options)
  if options.noun == 'exit':
    return [tuple(range(len(options)))]
  order = np.argsort(table, kind='stable').tolist()
  if len(options) <= FEW:
    lengths = range(2, len(options) + 1)
  else:
    top1 = record.top1.mean(0)
    best = np.maximum.accumulate(top1[order])
    good = [
      j for j, b in zip(order, best, strict=True) if top1[j] > b - _HOPELESS
    ]
    order = good if len(good) > 1 else order[:2]
    lengths = range(2, MOST_TRIED + 1)
  return [
    path
    for n in lengths
    for path in itertools.combinations(order, n)
    if options.keeps_exits_together(path)
  ]


def _answers(record: Record, path: tuple[int, ...]) -> list[str]:
  """'last', and 'pooled' where the record has all the means it takes."""
  known = set(record.columns)
  parts = itertools.combinations(range(len(path) + 1), 2)
  needed = [tuple(sorted(path[i:j])) for i, j in parts]
  return ['last', 'pooled'] if known.issuperset(needed) else ['last']


def _with_thresholds(
  record: Record,
  costs: Costs,
  path: tuple[int, ...],
  start: Dial | None = None,
) -> list[Policy]:
  """Policies of a path with the thresholds that are best at each price."""
  signal = 'probability' if record.margin is None else 'margin'
  stop, found = (AT_ONCE,) * (len(path) - 1), []
  for answer in _answers(record, path):
    plain = Policy(path, start, stop, answer, signal)
    walk = _Walk(plain, record, costs)
    cuts = {walk.best(price) for price in _PRICES / costs.full}
    # Between two prices lie costs that none leads to.
    for a, b in itertools.pairwise(sorted(cuts, key=walk.cost)):
      if walk.cost(b) - walk.cost(a) > 2 * _GAP * costs.full:
        cuts.update(walk.between(a, b))
    found += [dataclasses.replace(plain, stop=walk.limits(c)) for c in cuts]
  return found


class _Walk:
  """What images do along the path of a policy whose thresholds are to be set.

  Cuts are numbers of images, of all sorted by descending signal: those before
  the cut of an option leave there.
  """

  def __init__(self, policy: Policy, record: Record, costs: Costs):
    count, path = len(record.label), policy.path
    first = policy.begin(record.log_p, record.draw, count)
    paid = costs.of_path(record.options, path)
    column = np.empty((len(path), count), int)
    for i in range(len(path)):
      for start in np.unique(first):
        tried = policy.answered_by(min(start, i), i)
        column[i, first == start] = record.column(tried)
    # [P, N]: of each option of the path, what it would give each image.
    rows, option = np.arange(count), np.arange(len(path))[:, None]
    self._right = record.right[rows, column].astype(np.float64)
    self._cost = paid[np.minimum(first, option), option]
    self._first = first
    signal = record.signal(policy.signal)[rows, column].astype(np.float64)
    self._order = np.argsort(-signal, kind='stable')
    self._ordered = np.take_along_axis(signal, self._order, 1)
    # Numbers of images at which the signal changes, some images apart.
    self._places, most = [], np.clip(count // _IMAGES_PER_CUT, *_CUTS)
    for ordered in self._ordered[:-1]:
      places = np.flatnonzero(np.diff(ordered)) + 1
      if len(places) > most:
        places = places[np.linspace(0, len(places) - 1, most).astype(int)]
      self._places.append(np.concatenate([[0], places, [count]]))

  def best(self, price: float) -> tuple[int, ...]:
    """The cuts that are best at a price of cost, in top-1."""
    worth = self._right - price * self._cost
    cuts = [0] * len(self._places)
    for _ in range(_ROUNDS):
      before = list(cuts)
      for i in reversed(range(len(cuts))):
        onwards = self._from(i + 1, worth, cuts)
        gain = np.where(self._reach(i, cuts), worth[i] - onwards, 0.0)
        total = np.concatenate([[0.0], np.cumsum(gain[self._order[i]])])
        cuts[i] = int(self._places[i][total[self._places[i]].argmax()])
      if cuts == before:
        break
    return tuple(cuts)

  def _leaves(self, i: int, cut: int) -> np.ndarray:
    """Whether each image leaves at option i, should it come there, bool [N]."""
    leaves = np.zeros(len(self._order[i]), bool)
    leaves[self._order[i][:cut]] = True
    return leaves

  def _reach(self, i: int, cuts: Sequence[int]) -> np.ndarray:
    """Whether each image comes to option i, bool [N]."""
    here = self._first == 0
    for k in range(i):
      here = (here & ~self._leaves(k, cuts[k])) | (self._first == k + 1)
    return here

  def _from(self, i: int, values, cuts: Sequence[int]) -> np.ndarray:
    """[N], the value where each image leaves, once it comes to option i."""
    found = values[-1]
    for k in reversed(range(i, len(cuts))):
      found = np.where(self._leaves(k, cuts[k]), values[k], found)
    return found

  def cost(self, cuts: Sequence[int]) -> float:
    """Average cost of an image, the predictor left out."""
    total = np.zeros(len(self._first))
    for i in range(len(self._cost)):
      starts = self._first == i
      total[starts] = self._from(i, self._cost, cuts)[starts]
    return float(total.mean())

  def between(self, a: Sequence[int], b: Sequence[int]):
    """Cuts on the way from some to others."""
    for share in (0.25, 0.5, 0.75):
      wanted = (1 - share) * np.asarray(a) + share * np.asarray(b)
      yield tuple(
        int(places[np.abs(places - x).argmin()])
        for places, x in zip(self._places, wanted, strict=True)
      )

  def limits(self, cuts: Sequence[int]) -> tuple[float, ...]:
    """Thresholds half way between the images on either side of the cuts."""
    found = []
    for ordered, cut in zip(self._ordered[:-1], cuts, strict=True):
      if cut == 0:
        found.append(np.inf)
      elif cut == len(ordered):
        found.append(AT_ONCE)
      else:
        found.append(float((ordered[cut - 1] + ordered[cut]) / 2))
    return tuple(found)
