# SPDX-License-Identifier: Apache-2.0
"""A policy: where an image starts, when it stops, which answer counts.

| what people call it | path        | start | stop       |
|---------------------|-------------|-------|------------|
| fixed size          | one option  |       |            |
| router (DRNet)      | all sizes   | dial  | at once    |
| cascade             | some sizes  | first | thresholds |
| routed cascade      | all sizes   | dial  | thresholds |
| early exit (RANet)  | all exits   | first | thresholds |
| ladder              | of several networks | first | thresholds |

A new idea (a learned stop, a predictor that reads the features of the first
pass) is another `start` or `stop`.
"""

import dataclasses
from typing import Any

import numpy as np

from drnet_jax.choosing.options import Costs, Options
from drnet_jax.choosing.record import Record

FAMILIES = ('fixed', 'router', 'cascade', 'routed_cascade')
AT_ONCE = -np.inf  # as a threshold: every image leaves


@dataclasses.dataclass(frozen=True)
class Dial:
  """Starts an image at argmax(log p - lambda C): the budget dial of a router.

  Lambda 0 is the router as trained; a larger one saves, a negative one spends.
  Where many images change their start at the same lambda none gives the cost
  that was asked for; then a share of the images, told apart by a checksum of
  their pixels, takes another. The same image is always treated alike.

  Attributes:
    costs: [P], C of each option of the path.
    low: lambda, in 1 / the unit of C.
    high: lambda of the share.
    share: of the images that take `high`, in [0, 1].
  """

  costs: tuple[float, ...]
  low: float = 0.0
  high: float = 0.0
  share: float = 0.0

  def __call__(self, log_p: np.ndarray, draw: np.ndarray | None) -> np.ndarray:
    """Positions in the path, int [N]; the first of equals.

    Args:
      log_p: [N, P], of the options of the path.
      draw: [N] in [0, 1); may be None where nothing is mixed.
    """
    scores, costs = log_p.astype(np.float64), np.asarray(self.costs)
    first = (scores - self.low * costs).argmax(-1)
    if not self.share:
      return first
    other = (scores - self.high * costs).argmax(-1)
    return np.where(draw < self.share, other, first)


@dataclasses.dataclass(frozen=True)
class Policy:
  """See the module.

  Attributes:
    path: [P], options in the order in which they are tried.
    start: from (log p [N, P], draw [N]) to positions in the path, a `Dial` as a
      rule; None where all images start at the first.
    stop: [P - 1], how sure an answer must be for an image to leave, at each
      option but the last; -inf where all leave.
    answer: 'last', or 'pooled': the mean of all that was run for the image.
    signal: what `stop` is compared with: 'margin' (the largest probability less
      the second) or 'probability' (the largest), of the answer so far.
  """

  path: tuple[int, ...]
  start: Any = None
  stop: tuple[float, ...] = ()
  answer: str = 'last'
  signal: str = 'margin'

  def __post_init__(self):
    if len(self.stop) != len(self.path) - 1:
      raise ValueError(f'{self.path} takes {len(self.path) - 1} thresholds')

  @property
  def family(self) -> str:
    """One of FAMILIES."""
    if len(self.path) == 1:
      return 'fixed'
    if self.start is None:
      return 'cascade'
    stops = all(limit == AT_ONCE for limit in self.stop)
    return 'router' if stops else 'routed_cascade'

  @property
  def mixes(self) -> bool:
    """Whether where an image starts depends on its draw, too."""
    return isinstance(self.start, Dial) and self.start.share > 0

  def begin(
    self, log_p: np.ndarray | None, draw: np.ndarray | None, count: int
  ) -> np.ndarray:
    """Positions in the path at which `count` images start, int [N].

    `log_p` [N, R], None where no predictor is asked, and `draw` [N], None where
    nothing is mixed, are as in a `Record`.
    """
    if self.start is None:
      return np.zeros(count, int)
    return self.start(log_p[:, list(self.path)], draw)

  def answered_by(self, first: int, last: int) -> tuple[int, ...]:
    """The options whose mean answers after the path's places first to last."""
    return self.path[first if self.answer == 'pooled' else last : last + 1]

  def leaves(self, position: int, signal: np.ndarray) -> np.ndarray:
    """Whether images leave after the option at a position, bool [N].

    By the signal of their answers so far, float [N]; those of NaN leave.
    """
    if position == len(self.path) - 1:
      return np.ones(len(signal), bool)
    return ~(signal < self.stop[position])

  def to_json(self) -> dict[str, Any]:
    """As plain lists, numbers and strings."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> 'Policy':
    """Inverse of `to_json`."""
    lists = {name: tuple(fields[name]) for name in ('path', 'stop')}
    start = fields['start']
    if start:
      start = Dial(**start | {'costs': tuple(start['costs'])})
    return cls(**fields | lists | {'start': start})


def fixed(option: int) -> Policy:
  """Every image at one option."""
  return Policy((option,))


def router(costs: Costs, options: tuple[int, ...], **dial: float) -> Policy:
  """A predictor alone; as trained unless fields of its dial are given.

  `costs` are those of all options, `options` the ones that it knows.
  """
  table = tuple(costs.options[j] for j in options)
  stop = (AT_ONCE,) * (len(options) - 1)
  return Policy(options, Dial(table, **dial), stop)


def describe(policy: Policy, options: Options) -> str:
  """In words: 'cascade 64, 160 px, on while the margin is under 0.90'."""
  return ', '.join([name(policy, options), *details(policy)])


def name(policy: Policy, options: Options) -> str:
  """'cascade 64, 112, 160 px'."""
  names = [options.names[j] for j in policy.path]
  if all(one.endswith(' px') for one in names):
    names = [one.removesuffix(' px') for one in names]
    names[-1] += ' px'
  return f'{policy.family.replace("_", " ")} {", ".join(names)}'


def details(policy: Policy) -> list[str]:
  """How its dial and thresholds are set, and which answer counts."""
  found = []
  if isinstance(policy.start, Dial) and policy.start.low:
    found.append(f'lambda {policy.start.low:.3g}')
  if limits := ' and '.join(f'{x:.2f}' for x in policy.stop if np.isfinite(x)):
    found.append(f'on while the {policy.signal} is under {limits}')
  if policy.answer == 'pooled':
    found.append('answers pooled')
  return found


def routes(record: Record) -> tuple[int, ...]:
  """The options that the record's predictor knows; () without one."""
  if record.log_p is None:
    return ()
  return tuple(np.flatnonzero(np.isfinite(record.log_p).any(0)).tolist())


@dataclasses.dataclass(frozen=True)
class Decisions:
  """What a policy does with each image of a record.

  Attributes:
    first, last: int [N], positions in the path.
    option: int [N], at which the image ends.
    column: int [N], of the record, that answers.
    right: bool [N], whether the answer is the label.
    cost: float64 [N], everything counted.
  """

  first: np.ndarray
  last: np.ndarray
  option: np.ndarray
  column: np.ndarray
  right: np.ndarray
  cost: np.ndarray


def decide(policy: Policy, record: Record, costs: Costs) -> Decisions:
  """Plays a policy on a record, and counts in some costs.

  Raises:
    KeyError: the record lacks a mean that the policy answers with.
  """
  count, path = len(record.label), policy.path
  first = policy.begin(record.log_p, record.draw, count)
  last, column = first.copy(), np.zeros(count, int)
  signal = record.signal(policy.signal)
  for start in np.unique(first):
    here = np.flatnonzero(first == start)
    for i in range(start, len(path)):
      said = record.column(policy.answered_by(start, i))
      last[here], column[here] = i, said
      if i == len(path) - 1 or policy.stop[i] == AT_ONCE:
        break  # all leave: records of version 0.4 have no margin to ask
      here = here[~policy.leaves(i, signal[here, said])]
  paid = costs.of_path(record.options, path)[first, last]
  overhead = costs.predictor if policy.start is not None else 0.0
  return Decisions(
    first=first,
    last=last,
    option=np.asarray(path)[last],
    column=column,
    right=record.right[np.arange(count), column],
    cost=paid + overhead,
  )
