# SPDX-License-Identifier: Apache-2.0
"""What a way of choosing sizes scores: the router and its honest controls.

Everything is computed from one record of each image at each size, so that all
policies are judged on the same weights and the same images.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import scipy.stats

_EXTRA = 'extra.'  # prefix of an example's other fields, in a file


@dataclasses.dataclass(frozen=True)
class Record:
  """What the networks said of every image of a split.

  Attributes:
    options: what is chosen among, for people, [R]: '112 px', or 'exit 3'.
    gmacs: cost of each, [R]: of the base network at a size, or up to an exit.
    predictor_gmacs: cost of the predictor.
    label: int [N].
    predicted: int [N, R], class at each size.
    confidence: [N, R], probability of that class.
    top5: bool [N, R], the label is among the five likeliest classes.
    log_p: [N, R], the predictor's log-probabilities; None where no predictor
      has been trained.
    extra: other fields of the examples, [N] each; 'index' is the place in the
      split.
  """

  options: np.ndarray
  gmacs: np.ndarray
  predictor_gmacs: float
  label: np.ndarray
  predicted: np.ndarray
  confidence: np.ndarray
  top5: np.ndarray
  log_p: np.ndarray | None
  extra: Mapping[str, np.ndarray]

  @property
  def top1(self) -> np.ndarray:
    """bool [N, R]."""
    return self.predicted == self.label[:, None]

  @property
  def noun(self) -> str:
    """What is chosen: a 'size', or an 'exit'."""
    return 'size' if str(self.options[0]).endswith(' px') else 'exit'

  @property
  def choice(self) -> np.ndarray:
    """int [N], index of the size the router picks."""
    return self.log_p.argmax(1)


@dataclasses.dataclass(frozen=True)
class Policy:
  """Score of one way of choosing.

  Attributes:
    name: 'fixed 48 px', 'routed', ...
    gmacs: average cost of an image, everything counted.
    top1, top5: shares in [0, 1]; top5 None where it is not defined.
    shares: share of the images at each size, [R].
  """

  name: str
  gmacs: float
  top1: float
  top5: float | None
  shares: np.ndarray


def fixed(record: Record) -> list[Policy]:
  """Every image at the same size: no predictor."""
  return [
    Policy(
      name=f'fixed {option}',
      gmacs=float(record.gmacs[j]),
      top1=float(record.top1[:, j].mean()),
      top5=float(record.top5[:, j].mean()),
      shares=np.eye(len(record.gmacs))[j],
    )
    for j, option in enumerate(record.options)
  ]


def routed(record: Record) -> Policy:
  """Each image at the size the predictor picks; the predictor is counted."""
  return _per_image(
    'routed', record, record.choice, overhead=record.predictor_gmacs
  )


def smallest_sufficient(record: Record) -> np.ndarray:
  """Index of the smallest size that classifies each image correctly, int [N].

  R where no size does. The paper's Figure 1.
  """
  right = record.top1
  return np.where(right.any(1), right.argmax(1), right.shape[1])


def oracle(record: Record) -> Policy:
  """Each image at the smallest size that classifies it correctly.

  Images that no size gets right go to the smallest. Nothing can find this
  choice without the label: a bound, not a rival.
  """
  choice = smallest_sufficient(record) % len(record.gmacs)
  return _per_image('oracle', record, choice, overhead=0.0)


def random_choice(record: Record, gmacs: float) -> Policy:
  """Sizes drawn blindly at a given average cost; no predictor.

  The draw has the router's shares, shifted towards the largest size (or, if
  they are too dear, the smallest) until the cost is met. The score is the
  expectation, not one draw.
  """
  size_count = len(record.gmacs)
  shares = np.bincount(record.choice, minlength=size_count) / len(record.label)
  shares = shifted_to_cost(shares, record.gmacs, gmacs)
  return Policy(
    name='random',
    gmacs=float(shares @ record.gmacs),
    top1=float(record.top1.mean(0) @ shares),
    top5=float(record.top5.mean(0) @ shares),
    shares=shares,
  )


def shifted_to_cost(
  shares: np.ndarray, table: np.ndarray, gmacs: float
) -> np.ndarray:
  """Shares moved towards the dearest or the cheapest size to meet a cost.

  Args:
    shares: of the images at each size, [R].
    table: cost of each size, [R].
    gmacs: average cost to meet, as nearly as can be.
  """
  cost = shares @ table
  extreme = table.argmax() if gmacs > cost else table.argmin()
  span = table[extreme] - cost
  shift = np.clip((gmacs - cost) / span, 0.0, 1.0) if span else 0.0
  return (1 - shift) * shares + shift * np.eye(len(table))[extreme]


def cascade(record: Record, threshold: float) -> Policy:
  """Sizes tried in ascending order until one is confident; no predictor.

  Every size that is tried is paid for. The strongest rival that needs no
  training: it has seen the image at a size before it goes on to the next.

  Args:
    record: of a split.
    threshold: confidence in [0, 1] that stops.
  """
  last = cascade_stop(record, threshold)
  rows = np.arange(len(last))
  return Policy(
    name='confidence cascade',
    gmacs=float(np.cumsum(record.gmacs)[last].mean()),
    top1=float(record.top1[rows, last].mean()),
    top5=float(record.top5[rows, last].mean()),
    shares=np.bincount(last, minlength=len(record.gmacs)) / len(last),
  )


def cascade_stop(record: Record, threshold: float) -> np.ndarray:
  """Index of the last size that a cascade tries on each image, int [N]."""
  sure = record.confidence >= threshold
  sure[:, -1] = True
  return sure.argmax(1)


def cascade_thresholds(record: Record, count: int = 40) -> np.ndarray:
  """Thresholds, ascending, at which the cascade's cost spreads evenly."""
  return np.unique(np.quantile(record.confidence, np.linspace(0, 1, count)))


def cascade_curve(record: Record) -> list[Policy]:
  """The confidence cascade from its cheapest setting to its dearest."""
  return [cascade(record, t) for t in cascade_thresholds(record)]


def hull_points(record: Record) -> tuple[np.ndarray, np.ndarray]:
  """Corners (gmacs, top1) of the upper hull of the fixed sizes, ascending.

  Between two corners lies what a mixture of the two sizes scores on average.
  """
  return upper_hull(record.gmacs, record.top1.mean(0))


def upper_hull(
  gmacs: np.ndarray, top1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Corners of the upper hull of points, ascending in both coordinates."""
  points = sorted(zip(gmacs.tolist(), top1.tolist(), strict=True))
  hull = []
  for x, y in points:
    if hull and y <= hull[-1][1]:
      continue  # dearer and no better
    while len(hull) > 1 and _is_below(hull[-2], hull[-1], (x, y)):
      hull.pop()
    hull.append((x, y))
  return tuple(np.asarray(hull).T)


def best_fixed(record: Record, gmacs: float) -> Policy:
  """The hull of the fixed sizes at a given cost: the control to beat."""
  costs, top1 = hull_points(record)
  return Policy(
    name='best fixed',
    gmacs=float(np.clip(gmacs, costs[0], costs[-1])),
    top1=float(np.interp(gmacs, costs, top1)),
    top5=None,
    shares=np.full(len(record.gmacs), np.nan),
  )


def all_policies(record: Record) -> list[Policy]:
  """Fixed sizes, the router, and at its cost its controls."""
  if record.log_p is None:
    return [*fixed(record), oracle(record)]
  router = routed(record)
  return [
    *fixed(record),
    router,
    best_fixed(record, router.gmacs),
    random_choice(record, router.gmacs),
    oracle(record),
  ]


def rank_correlations(record: Record) -> dict[str, float]:
  """Spearman's rho between the chosen size and each numeric extra field."""
  if record.log_p is None:
    return {}
  return {
    name: float(scipy.stats.spearmanr(values, record.choice).statistic)
    for name, values in record.extra.items()
    if name != 'index'
    and np.issubdtype(values.dtype, np.number)
    and np.ptp(record.choice)
  }


def save(record: Record, path: str) -> None:
  """Writes a record as one npz file, without pickles."""
  fields = {k: v for k, v in vars(record).items() if k != 'extra'}
  extra = {_EXTRA + k: v for k, v in record.extra.items()}
  present = {k: v for k, v in fields.items() if v is not None}
  np.savez_compressed(path, **present, **extra)


def load(path: str) -> Record:
  """Reads what `save` wrote."""
  with np.load(path) as file:
    arrays = {'log_p': None} | dict(file)
  if 'resolutions' in arrays:  # as files of version 0.2 call it
    arrays['options'] = np.array([f'{r} px' for r in arrays.pop('resolutions')])
  extra = {k: arrays.pop(k) for k in list(arrays) if k.startswith(_EXTRA)}
  arrays['predictor_gmacs'] = float(arrays['predictor_gmacs'])
  return Record(
    **arrays, extra={k.removeprefix(_EXTRA): v for k, v in extra.items()}
  )


def _per_image(
  name: str, record: Record, choice: np.ndarray, *, overhead: float
) -> Policy:
  rows = np.arange(len(choice))
  shares = np.bincount(choice, minlength=len(record.gmacs)) / len(choice)
  return Policy(
    name=name,
    gmacs=float(shares @ record.gmacs + overhead),
    top1=float(record.top1[rows, choice].mean()),
    top5=float(record.top5[rows, choice].mean()),
    shares=shares,
  )


def _is_below(left, middle, right) -> bool:
  """Whether `middle` lies on or under the line from `left` to `right`."""
  (x0, y0), (x1, y1), (x2, y2) = left, middle, right
  return (y1 - y0) * (x2 - x0) <= (y2 - y0) * (x1 - x0)
