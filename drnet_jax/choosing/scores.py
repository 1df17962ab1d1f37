# SPDX-License-Identifier: Apache-2.0
"""What policies score, beside honest rivals, and how sure the figures are.

What every policy scores is a function of means of a few columns, in which each
image has a row. So to resample the images is to average the columns with other
weights, and a difference of two policies is always taken on the same images.
Images made of one original are drawn together. An interval says what another
draw of test images might have given; it says nothing of another training run.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from drnet_jax.choosing.policy import Policy, decide, fixed
from drnet_jax.choosing.record import Record

RESAMPLES = 1000
_CHUNK = 20  # resamples averaged together
_LEVEL = (0.025, 0.975)
Z = 1.96  # standard errors on either side of the same interval


@dataclasses.dataclass(frozen=True)
class Score:
  """What a policy gives on the images of a record.

  Attributes:
    name: of the policy.
    gmacs: average cost of an image, everything counted.
    top1, top5: shares in [0, 1]; top5 None where it is not defined.
    shares: of the images that leave at each option, [R]; NaN where it is not
      defined.
  """

  name: str
  gmacs: float
  top1: float
  top5: float | None
  shares: np.ndarray


def score(policy: Policy, record: Record, name: str) -> Score:
  """Plays a policy on a record."""
  found = decide(policy, record, record.costs)
  count, options = len(found.option), len(record.options)
  return Score(
    name=name,
    gmacs=float(found.cost.mean()),
    top1=float(found.right.mean()),
    top5=float(record.top5[np.arange(count), found.column].mean()),
    shares=np.bincount(found.option, minlength=options) / count,
  )


def fixed_scores(record: Record) -> list[Score]:
  """Every image at the same option, for each option."""
  return [
    score(fixed(j), record, f'fixed {name}')
    for j, name in enumerate(record.options.names)
  ]


def smallest_sufficient(record: Record) -> np.ndarray:
  """Index of the cheapest option that is right about each image, int [N].

  R where none is. The paper's Figure 1.
  """
  order = np.argsort(record.gmacs, kind='stable')
  right = record.top1[:, order]
  return np.where(right.any(1), order[right.argmax(1)], len(order))


def oracle(record: Record) -> Score:
  """Each image at the cheapest option that is right about it.

  Images that none gets right go to the cheapest. Nothing can find this choice
  without the label: a bound, not a rival.
  """
  choice = _oracle_choice(record)
  rows = np.arange(len(choice))
  shares = np.bincount(choice, minlength=len(record.options)) / len(choice)
  return Score(
    name='oracle',
    gmacs=float(shares @ record.gmacs),
    top1=float(record.top1[rows, choice].mean()),
    top5=float(record.top5[rows, choice].mean()),
    shares=shares,
  )


def _oracle_choice(record: Record) -> np.ndarray:
  needed = smallest_sufficient(record)
  return np.where(needed < len(record.options), needed, record.gmacs.argmin())


def blind_shares(
  shares: np.ndarray, table: np.ndarray, cost: float
) -> np.ndarray:
  """Shares moved to the most or the least expensive option to meet a cost.

  Shares are of the images at each option, [R], whose costs the table, [R], has;
  the average is met as nearly as can be. The random rival draws options with
  these, whatever the image.
  """
  now = shares @ table
  extreme = table.argmax() if cost > now else table.argmin()
  span = table[extreme] - now
  shift = np.clip((cost - now) / span, 0.0, 1.0) if span else 0.0
  return (1 - shift) * shares + shift * np.eye(len(table))[extreme]


def upper_hull(
  cost: np.ndarray, top1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Corners of the upper hull of points, ascending in both coordinates.

  Between two corners lies what a mixture of the two scores on average.
  """
  hull: list[tuple[float, float]] = []
  for x, y in sorted(zip(cost.tolist(), top1.tolist(), strict=True)):
    if hull and y <= hull[-1][1]:
      continue  # more expensive and no better
    while len(hull) > 1 and _is_below(hull[-2], hull[-1], (x, y)):
      hull.pop()
    hull.append((x, y))
  x, y = zip(*hull, strict=True)
  return np.asarray(x), np.asarray(y)


def hull_top1(record: Record, gmacs: float) -> float:
  """Top-1 of the best fixed option, or mixture of two, at a cost."""
  return float(np.interp(gmacs, *upper_hull(record.gmacs, record.top1.mean(0))))


def _is_below(left, middle, right) -> bool:
  """Whether `middle` lies on or under the line from `left` to `right`."""
  (x0, y0), (x1, y1), (x2, y2) = left, middle, right
  return (y1 - y0) * (x2 - x0) <= (y2 - y0) * (x1 - x0)


@dataclasses.dataclass(frozen=True)
class Interval:
  """A number and its 95 % interval."""

  value: float
  low: float
  high: float

  @property
  def sign(self) -> int:
    """1 or -1 where the interval lies above or below zero, else 0."""
    return int(self.low > 0) - int(self.high < 0)


@dataclasses.dataclass(frozen=True)
class Scored:
  """A policy and how sure its figures are.

  Attributes:
    name, gmacs, top1, top5, shares: as of a `Score`.
    gain: top-1 of the judged policy less this one's, on the same images.
  """

  name: str
  gmacs: Interval
  top1: Interval
  top5: float | None
  gain: Interval
  shares: np.ndarray


@dataclasses.dataclass(frozen=True)
class Judgement:
  """A policy among its rivals, all on the same weights and images.

  Attributes:
    policy: itself; its gain is zero.
    fixed: every option for all images.
    best_fixed, random: at its cost.
    oracle: a bound, not a rival.
    others: further policies by name.
    saving: share of the most expensive option's cost that it saves.
  """

  policy: Scored
  fixed: tuple[Scored, ...]
  best_fixed: Scored
  random: Scored
  oracle: Scored
  others: Mapping[str, Scored]
  saving: Interval

  @property
  def full(self) -> Scored:
    """Every image at the most expensive option."""
    return max(self.fixed, key=lambda s: s.gmacs.value)

  @property
  def best_single(self) -> Scored:
    """The option that is best for all images; the cheapest of equals."""
    return max(self.fixed, key=lambda s: (s.top1.value, -s.gmacs.value))

  @property
  def all(self) -> list[Scored]:
    """In the order of the table."""
    return [
      *self.fixed,
      self.policy,
      *self.others.values(),
      self.best_fixed,
      self.random,
      self.oracle,
    ]


def judge(
  record: Record,
  policy: Policy,
  *,
  name: str,
  others: Mapping[str, Policy] | None = None,
  resamples: int = RESAMPLES,
) -> Judgement:
  """Scores a policy and its rivals, `others` by name among them."""
  policies = {name: policy} | dict(others or {})
  num_options, table = len(record.options), record.gmacs
  decided = [decide(p, record, record.costs) for p in policies.values()]
  parts = [
    record.top1,
    np.stack([d.right for d in decided], 1),
    np.stack([d.cost for d in decided], 1),
    # Which option an image would get blindly: the one where the policy ends.
    np.eye(num_options)[decided[0].option],
    np.stack([record.top1.any(1), table[_oracle_choice(record)]], 1),
  ]
  columns = np.concatenate(parts, 1, dtype=np.float64)
  ends = np.cumsum([x.shape[1] for x in parts])[:-1]

  def scores(means: np.ndarray) -> np.ndarray:
    """[scores, 2]: cost and top-1 of each, from means of the columns."""
    top1, right, cost, shares, bound = np.split(means, ends)
    hull_cost, hull = upper_hull(table, top1)
    blind = blind_shares(shares, table, cost[0])
    return np.array(
      [
        *zip(table, top1, strict=True),
        *zip(cost, right, strict=True),
        (
          np.clip(cost[0], hull_cost[0], hull_cost[-1]),
          np.interp(cost[0], hull_cost, hull),
        ),
        (blind @ table, blind @ top1),
        (bound[1], bound[0]),
      ]
    )

  whole = scores(columns.mean(0))
  samples = np.array(
    [scores(m) for m in resampled_means(columns, record.groups, resamples)]
  )
  undefined = np.nan, np.nan, None, np.full(num_options, np.nan)
  plain = [
    *fixed_scores(record),
    *(score(p, record, k) for k, p in policies.items()),
    Score('best fixed', *undefined),
    Score('random', *undefined),
    oracle(record),
  ]
  cost, top1 = whole[num_options]  # of the policy
  costs, top1s = samples[:, num_options].T
  found = [
    Scored(
      name=one.name,
      gmacs=interval(whole[i, 0], samples[:, i, 0]),
      top1=interval(whole[i, 1], samples[:, i, 1]),
      top5=one.top5,
      gain=interval(top1 - whole[i, 1], top1s - samples[:, i, 1]),
      shares=one.shares,
    )
    for i, one in enumerate(plain)
  ]
  judged, *further, best_fixed, random, bound = found[num_options:]
  full = record.costs.full
  return Judgement(
    policy=judged,
    fixed=tuple(found[:num_options]),
    best_fixed=best_fixed,
    random=random,
    oracle=bound,
    others={one.name: one for one in further},
    saving=interval(1 - cost / full, 1 - costs / full),
  )


def over_networks(
  record: Record,
  policy: Policy,
  right: np.ndarray,
  gmacs: np.ndarray,
) -> Interval:
  """Top-1 of a policy less that of other networks at its cost.

  Of the best of them, or the best mixture of two: as `Judgement.best_fixed`.
  Network m, of cost `gmacs` [M], is right about the record's images where
  `right`, bool [N, M], says so.
  """
  decided = decide(policy, record, record.costs)
  columns = np.column_stack([decided.right, decided.cost, right]).astype(float)

  def gain(means: np.ndarray) -> float:
    return means[0] - np.interp(means[1], *upper_hull(gmacs, means[2:]))

  samples = resampled_means(columns, record.groups, RESAMPLES)
  return interval(gain(columns.mean(0)), np.array([gain(m) for m in samples]))


def difference(
  ours: np.ndarray,
  theirs: np.ndarray,
  groups: np.ndarray,
  resamples: int = RESAMPLES,
) -> Interval:
  """Of two means over the same images, [N] each."""
  columns = np.stack([ours, theirs], 1).astype(np.float64)
  samples = resampled_means(columns, groups, resamples)
  return interval(ours.mean() - theirs.mean(), samples[:, 0] - samples[:, 1])


def resampled_means(
  columns: np.ndarray, groups: np.ndarray, resamples: int
) -> np.ndarray:
  """Means over as many groups drawn with replacement, [resamples, C].

  Rows of `columns` [N, C] whose `groups`, int [N] from 0, are of one number are
  drawn together.
  """
  rng = np.random.default_rng(0)
  size = np.bincount(groups)
  count = len(size)
  sums = np.zeros((count, columns.shape[1]))
  np.add.at(sums, groups, columns)
  found = []
  for start in range(0, resamples, _CHUNK):
    drawn = [
      np.bincount(rng.integers(count, size=count), minlength=count)
      for _ in range(min(_CHUNK, resamples - start))
    ]
    drawn = np.asarray(drawn, np.float64)
    found.append(drawn @ sums / (drawn @ size)[:, None])
  return np.concatenate(found)


def interval(value: float, samples: np.ndarray) -> Interval:
  """Of a number, from what resampled images gave."""
  low, high = np.quantile(samples, _LEVEL)
  return Interval(float(value), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class ClassEffect:
  """What a policy does to the images of one class.

  Attributes:
    name: of the class.
    images: of it.
    full: top-1 at the most expensive option.
    change: the policy's top-1 less that; its interval is NaN where all images
      are of one original.
    gmacs: average cost of an image.
  """

  name: str
  images: int
  full: float
  change: Interval
  gmacs: float


def by_class(
  record: Record, policy: Policy, class_names: Sequence[str]
) -> list[ClassEffect]:
  """Of every class that has images, the most harmed first.

  Intervals are 1.96 standard errors of the paired difference, of groups of
  images: of many classes some lie beyond by chance.
  """
  decided = decide(policy, record, record.costs)
  groups = record.groups
  full = record.top1[:, record.gmacs.argmax()].astype(float)
  change = decided.right - full
  found = []
  for label in np.unique(record.label):
    mine = np.flatnonzero(record.label == label)
    mean = float(change[mine].mean())
    half = Z * standard_error(change[mine] - mean, groups[mine])
    found.append(
      ClassEffect(
        name=class_names[label],
        images=len(mine),
        full=float(full[mine].mean()),
        change=Interval(mean, mean - half, mean + half),
        gmacs=float(decided.cost[mine].mean()),
      )
    )
  return sorted(found, key=lambda effect: effect.change.value)


def standard_error(residuals: np.ndarray, groups: np.ndarray) -> float:
  """Of a mean, from residuals whose groups are independent; NaN of one."""
  sums = np.bincount(np.unique(groups, return_inverse=True)[1], residuals)
  count = len(sums)
  if count < 2:
    return float('nan')
  return float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(residuals))


def rank_correlations(record: Record, ends: np.ndarray) -> dict[str, float]:
  """Spearman's rho between where images end and each numeric extra field.

  `ends`, int [N], are indices of options.
  """
  if not np.ptp(ends):
    return {}
  return {
    name: float(np.corrcoef(_ranks(values), _ranks(ends))[0, 1])
    for name, values in record.extra.items()
    if name not in ('index', 'original')
    and np.issubdtype(values.dtype, np.number)
    and np.ptp(values)  # equal ones have no ranks
  }


def _ranks(values: np.ndarray) -> np.ndarray:
  """From 1; equal values share the mean of theirs."""
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  ends = np.cumsum(counts)
  return (ends - (counts - 1) / 2)[place]
