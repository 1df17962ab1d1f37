# SPDX-License-Identifier: Apache-2.0
"""The honest comparison: a router and its rivals, with bootstrap intervals.

What every policy scores is a function of the means of a few columns (is size r
right, does the router choose it, what does the cascade pay, ...), one row an
image. So resampling the images means averaging the columns with other weights,
and a difference of two policies is always taken on the same images. An interval
says what another draw of test images might have given; it says nothing of
another training run.
"""

import dataclasses

import numpy as np

from drnet_jax.report import policies
from drnet_jax.report.policies import Record

RESAMPLES = 1000
_AT_ONCE = 20  # resamples averaged together
_LEVEL = (0.025, 0.975)
_MARGIN = 1.96  # standard errors of the same interval
_COLLAPSED = 0.95  # of the images at one size
_RARE = 0.01


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
    name: as `policies` calls it.
    gmacs: average cost of an image, everything counted.
    top1: share in [0, 1].
    top5: share, or None where it is not defined.
    gain: top-1 of the router less this one's, on the same images.
    shares: of the images at each size, [R]; NaN where it is not defined.
  """

  name: str
  gmacs: Interval
  top1: Interval
  top5: float | None
  gain: Interval
  shares: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A router among its rivals, all on the same weights and images.

  Attributes:
    router: itself; its gain is zero.
    full: every image at the dearest size.
    best_fixed, random: at the router's cost.
    cascade: at the router's cost; None for exits of one network, which share
      their computation.
    oracle: a bound, not a rival.
    fixed: every size.
    saving: share of the dearest size's cost that the router saves.
  """

  router: Scored
  full: Scored
  best_fixed: Scored
  random: Scored
  cascade: Scored | None
  oracle: Scored
  fixed: list[Scored]
  saving: Interval

  @property
  def all(self) -> list[Scored]:
    """In the order of the table."""
    rivals = [self.best_fixed, self.random, self.cascade, self.oracle]
    return [*self.fixed, self.router, *(r for r in rivals if r)]

  @property
  def best_single(self) -> Scored:
    """The size that is best for all images; the cheapest of equals."""
    return max(self.fixed, key=lambda s: (s.top1.value, -s.gmacs.value))

  @property
  def collapsed(self) -> int | None:
    """Index of the size that nearly all images are sent to, if there is one."""
    most = int(self.router.shares.argmax())
    return most if self.router.shares[most] > _COLLAPSED else None

  @property
  def rare(self) -> np.ndarray:
    """Indices of the sizes that hardly any image is sent to."""
    return np.flatnonzero(self.router.shares < _RARE)


def compare(
  record: Record,
  *,
  name: str = 'routed',
  cascade: bool = True,
  resamples: int = RESAMPLES,
) -> Comparison:
  """Scores a router and its rivals.

  Args:
    record: of a split, with a trained predictor.
    name: of the router.
    cascade: whether trying one size after another is a rival.
    resamples: of the images, for the intervals.
  """
  scores = _Scores(record, cascade)
  whole = scores(scores.columns.mean(0, dtype=np.float64))
  samples = np.array(
    [scores(means) for means in resampled_means(scores.columns, resamples)]
  )  # [resamples, policies, 2]
  router = scores.names.index('routed')
  gains = (
    whole[router, 1] - whole[:, 1],
    samples[:, router, 1:] - samples[:, :, 1],
  )
  known = {p.name: p for p in policies.all_policies(record)}
  found = {}
  for i, known_as in enumerate(scores.names):
    policy = known.get(known_as)
    found[known_as] = Scored(
      name=name if i == router else known_as,
      gmacs=interval(whole[i, 0], samples[:, i, 0]),
      top1=interval(whole[i, 1], samples[:, i, 1]),
      top5=policy.top5 if policy else None,
      gain=interval(gains[0][i], gains[1][:, i]),
      shares=policy.shares if policy else np.full(len(record.gmacs), np.nan),
    )
  full = record.gmacs.max()
  return Comparison(
    router=found['routed'],
    full=found[f'fixed {record.options[record.gmacs.argmax()]}'],
    best_fixed=found['best fixed'],
    random=found['random'],
    cascade=found.get('cascade'),
    oracle=found['oracle'],
    fixed=[found[f'fixed {option}'] for option in record.options],
    saving=interval(
      1 - whole[router, 0] / full, 1 - samples[:, router, 0] / full
    ),
  )


def fixed_sizes(record: Record, resamples: int = RESAMPLES) -> list[Scored]:
  """Every size for all images, where nothing chooses; gains are none."""
  right = record.top1.astype(np.float32)
  samples = resampled_means(right, resamples)
  nothing = Interval(np.nan, np.nan, np.nan)
  return [
    Scored(
      name=policy.name,
      gmacs=Interval(policy.gmacs, policy.gmacs, policy.gmacs),
      top1=interval(policy.top1, samples[:, j]),
      top5=policy.top5,
      gain=nothing,
      shares=policy.shares,
    )
    for j, policy in enumerate(policies.fixed(record))
  ]


def difference(
  ours: np.ndarray, theirs: np.ndarray, resamples: int = RESAMPLES
) -> Interval:
  """Of two means over the same images, [N] each."""
  columns = np.stack([ours, theirs], 1).astype(np.float32)
  samples = resampled_means(columns, resamples)
  return interval(ours.mean() - theirs.mean(), samples[:, 0] - samples[:, 1])


def resampled_means(
  columns: np.ndarray, resamples: int, seed: int = 0
) -> np.ndarray:
  """Means over as many rows drawn with replacement, [resamples, C].

  Args:
    columns: [N, C].
    resamples: how often.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)
  count = len(columns)
  found = []
  for start in range(0, resamples, _AT_ONCE):
    size = min(_AT_ONCE, resamples - start)
    drawn = [
      np.bincount(rng.integers(count, size=count), minlength=count)
      for _ in range(size)
    ]
    found.append(np.asarray(drawn, columns.dtype) @ columns / count)
  return np.concatenate(found).astype(np.float64)


def interval(value: float, samples: np.ndarray) -> Interval:
  """Of a number, from what resampled images gave."""
  low, high = np.quantile(samples, _LEVEL)
  return Interval(float(value), float(low), float(high))


class _Scores:
  """Cost and top-1 of every policy, from means of columns.

  Called with the means [C] of `columns` over some images; returns [policies,
  2]: GMACs and top-1. Agrees with `policies` on the images as they are.
  """

  def __init__(self, record: Record, cascade: bool):
    self._table = record.gmacs
    self._predictor = record.predictor_gmacs
    rows = np.arange(len(record.label))
    best = policies.smallest_sufficient(record)
    self._parts = {
      'right': record.top1,
      'chosen': np.eye(len(self._table))[record.choice],
      'routed': record.top1[rows, record.choice],
      'oracle': record.top1.any(1),
      'oracle cost': record.gmacs[best % len(self._table)],
    }
    self.names = [
      *(f'fixed {option}' for option in record.options),
      'routed',
      'best fixed',
      'random',
      'oracle',
    ]
    if cascade:
      paid = np.cumsum(record.gmacs)
      stops = [
        policies.cascade_stop(record, t)
        for t in policies.cascade_thresholds(record)
      ]
      self._parts['cascade'] = np.stack(
        [record.top1[rows, stop] for stop in stops], 1
      )
      self._parts['cascade cost'] = np.stack([paid[stop] for stop in stops], 1)
      self.names.append('cascade')
    columns = [x.reshape(len(rows), -1) for x in self._parts.values()]
    self._ends = np.cumsum([x.shape[1] for x in columns])[:-1]
    self.columns = np.concatenate(columns, 1, dtype=np.float32)

  def __call__(self, means: np.ndarray) -> np.ndarray:
    part = dict(zip(self._parts, np.split(means, self._ends), strict=True))
    fixed, shares = part['right'], part['chosen']
    cost = shares @ self._table + self._predictor
    hull_cost, hull_top1 = policies.upper_hull(self._table, fixed)
    blind = policies.shifted_to_cost(shares, self._table, cost)
    scores = [
      *zip(self._table, fixed, strict=True),
      (cost, part['routed'][0]),
      (
        np.clip(cost, hull_cost[0], hull_cost[-1]),
        np.interp(cost, hull_cost, hull_top1),
      ),
      (blind @ self._table, blind @ fixed),
      (part['oracle cost'][0], part['oracle'][0]),
    ]
    if 'cascade' in part:
      paid = part['cascade cost']
      scores.append(
        (
          np.clip(cost, paid[0], paid[-1]),
          np.interp(cost, paid, part['cascade']),
        )
      )
    return np.array(scores)


@dataclasses.dataclass(frozen=True)
class ClassEffect:
  """What routing does to the images of one class.

  Attributes:
    name: of the class.
    images: of it.
    full: top-1 at the dearest size.
    change: routed top-1 less that.
    gmacs: average cost of an image.
  """

  name: str
  images: int
  full: float
  change: Interval
  gmacs: float


def by_class(record: Record, class_names) -> list[ClassEffect]:
  """Of every class that has images, the most harmed first.

  Intervals are 1.96 standard errors of the paired difference: of many classes
  some lie beyond by chance.
  """
  rows = np.arange(len(record.label))
  full = record.top1[:, record.gmacs.argmax()].astype(float)
  change = record.top1[rows, record.choice] - full
  cost = record.gmacs[record.choice] + record.predictor_gmacs
  found = []
  for label in np.unique(record.label):
    mine = record.label == label
    count, mean = int(mine.sum()), float(change[mine].mean())
    margin = _MARGIN * float(change[mine].std() / np.sqrt(count))
    found.append(
      ClassEffect(
        name=class_names[label],
        images=count,
        full=float(full[mine].mean()),
        change=Interval(
          float(mean), float(mean - margin), float(mean + margin)
        ),
        gmacs=float(cost[mine].mean()),
      )
    )
  return sorted(found, key=lambda effect: effect.change.value)
