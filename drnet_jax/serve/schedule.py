# SPDX-License-Identifier: Apache-2.0
"""The one scheduler: images under way along the path of a policy.

An image waits in the queue of its option, or of the predictor that is to choose
one, until a batch is full, is run, and leaves or joins another queue with what
it carries: its crops or what the device has of it, and the answers so far.
Whoever holds a `Schedule` (a call of `predict`, a stream) decides when a batch
that is not full must run.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.record import checksum, pooled, signals
from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract, View
from drnet_jax.serve.engines import Engine
from drnet_jax.serve.picture import Picture

_WARM = 16  # images: of more, a new number costs little beside its run
_FADES = 0.9  # what is thought of a slow batch, by each that follows


@dataclasses.dataclass(eq=False)
class Item:
  """An image on its way."""

  key: Any  # by which whoever schedules it knows it
  picture: Picture
  policy: Policy | None = None  # that it follows, once it is let in
  # Probabilities [K] of each option that was tried on it, and where in the
  # policy's path these are.
  said: list[np.ndarray] = dataclasses.field(default_factory=list)
  tried: list[int] = dataclasses.field(default_factory=list)
  joined: float = 0.0  # when, by the monotonic clock, the queue that it is in
  hurried: bool = False  # it left with what was known: there was no more time


class Stop(NamedTuple):
  """A place in the plan: an option that images come to, or the predictor."""

  option: int | None  # None is the predictor, which begins the plan
  # In the policy's path; None where images only pass an exit on their way to a
  # later one.
  position: int | None


def plan(policy: Policy, contract: Contract) -> tuple[list[Stop], list[int]]:
  """The places that a policy leads through; all images begin at the first.

  Returns:
    The places in order, and to which of them the predictor sends an image that
    starts at each position of the path.

  Raises:
    UserError: it leaves a network with exits, and comes back to it.
  """
  if not contract.options.keeps_exits_together(policy.path):
    raise UserError(
      f'{policy_lib.describe(policy, contract.options)}: exits of a network '
      'must follow one another, for features are handed from one to the next. '
      'If a calibration chose it, calibrate again'
    )
  asks = policy.start is not None
  stops, entries = [Stop(None, None)] if asks else [], []
  chains = contract.options.chain
  for position, option in enumerate(policy.path):
    entries.append(len(stops))
    if chains[option] >= 0:
      come_by = {stop.option for stop in stops}
      stops += [
        Stop(j, None)
        for j in range(chains.index(chains[option]), option)
        if j not in come_by
      ]
    stops.append(Stop(option, position))
  return stops, entries


class _Flight(NamedTuple):
  """A batch that runs, or whose results are to be fetched."""

  place: int
  items: list[Item]
  said: Any  # [B, ...]
  state: Any  # that images go on with
  crops: np.ndarray | None  # that it runs on


class Waiting:
  """Images that wait for an option as crops, the oldest first."""

  def __init__(self):
    self.waiting: collections.deque[Item] = collections.deque()


class Schedule:
  """Images under way, run in batches of at most `batch`; see the module.

  Args:
    engine, contract, policy: what runs, and how.
    batch: the most images that run at once.
    done: called with items that leave together, and their answers [N, K].
    hurries: whether an image that is to go on, to the place given, must leave
      with what is known of it.

  Attributes:
    predicts: whether the first place is the predictor.
    asked: the views that an image may be asked for; it is let in with these
      cut.
    seconds: per place, that images which went on lately waited and ran there;
      of slow batches it fades.
  """

  def __init__(
    self,
    engine: Engine,
    contract: Contract,
    policy: Policy,
    batch: int,
    done: Callable[[list[Item], np.ndarray], None],
    hurries: Callable[[Item, int], bool] = lambda item, place: False,
  ):
    self._engine, self._contract, self._policy = engine, contract, policy
    self._batch, self._done, self._hurries = batch, done, hurries
    self._stops, self._entries = plan(policy, contract)
    self.predicts = self._stops[0].option is None
    self.queues = [
      (place and engine.pool(stop.option)) or Waiting()
      for place, stop in enumerate(self._stops)
    ]
    self._in_flight: collections.deque[_Flight] = collections.deque()
    self._spare: dict[tuple, list[np.ndarray]] = collections.defaultdict(list)
    self.seconds = [0.0] * len(self._stops)
    self.asked = [
      self._view(place)
      for place, queue in enumerate(self.queues)
      if isinstance(queue, Waiting)
    ]
    self._alone = False

  def admit(self, items: Sequence[Item], *, alone: bool = False) -> None:
    """Lets images in that were read.

    `alone`: no other image will come, so none waits for another.
    """
    self._alone = alone
    for item in items:
      item.policy = self._policy
      self._join(0, item)

  def _join(self, place: int, item: Item) -> None:
    """Lets an image wait at a place, as crops."""
    item.joined = time.monotonic()
    self.queues[place].waiting.append(item)

  def _view(self, place: int) -> View:
    """What an image is cut to at a place."""
    option = self._stops[place].option
    contract = self._contract
    return contract.predictor_view if option is None else contract.views[option]

  def full(self) -> int | None:
    """The last place that has a whole batch waiting; None if none has."""
    for place in reversed(range(len(self.queues))):
      if len(self.queues[place].waiting) >= self._batch:
        return place
    return None

  def held(self) -> set[Item]:
    """The images that wait, or whose results are to be fetched."""
    waiting = (queue.waiting for queue in self.queues)
    flying = (flight.items for flight in self._in_flight)
    return set().union(*waiting, *flying)

  @property
  def first_waiting(self) -> int | None:
    """The first place at which an image waits; None if none does."""
    waiting = (i for i, q in enumerate(self.queues) if q.waiting)
    return next(waiting, None)

  @property
  def in_flight(self) -> int:
    """Batches that run, or whose results are to be fetched."""
    return len(self._in_flight)

  def start(self, place: int) -> None:
    """Runs a batch of what waits at a place; its results are fetched later."""
    queue = self.queues[place]
    if isinstance(queue, Waiting):
      count = min(len(queue.waiting), self._batch)
      taken = [queue.waiting.popleft() for _ in range(count)]
      view, now = self._view(place), time.monotonic()
      for item in taken:
        if not item.tried:  # it may have waited for others, as none does later
          item.joined = now
      shape = (count, view.side_px, view.side_px, 3)
      # New memory takes longer to fill than what was used before.
      crops = self._spare[shape].pop() if self._spare[shape] else None
      crops = np.stack([x.picture.crop(view) for x in taken], out=crops)
      self._run(place, taken, self._engine.put(crops), crops)
    else:
      inputs, taken = queue.pop(self._batch)
      self._run(place, taken, inputs)

  def _run(
    self,
    place: int,
    items: list[Item],
    inputs: Any,
    crops: np.ndarray | None = None,
  ) -> None:
    """Runs a batch; once it is fetched the memory of `crops` is used again."""
    said, state = self._compute(place, inputs)
    self._in_flight.append(_Flight(place, items, said, state, crops))

  def _compute(self, place: int, inputs: Any) -> tuple[Any, Any]:
    """What is said of a batch at a place, [B, ...], and the state after."""
    option = self._stops[place].option
    if option is None:
      return self._engine.log_p(inputs), inputs
    return self._engine.run(option, inputs)

  def warm_up(self) -> None:
    """Runs black images, so that the first ones that come find all ready."""
    # Some runtimes make a program of every number of images they meet.
    counts = [*range(1, min(self._batch, _WARM)), self._batch]
    buckets = {
      tuple(self._engine.bucket(stop.option, n) for stop in self._stops)
      for n in counts
    }
    for of_place in buckets:
      state = None
      for place, (queue, count) in enumerate(
        zip(self.queues, of_place, strict=True)
      ):
        if isinstance(queue, Waiting):
          side = self._view(place).side_px
          state = self._engine.put(np.zeros((count, side, side, 3), np.uint8))
        said, state = self._compute(place, state)
        np.asarray(said)

  def work(self) -> None:
    """Runs what is full, and fetches results beyond those to keep in flight."""
    while (place := self.full()) is not None:
      self.start(place)
      if len(self._in_flight) > self._engine.in_flight:
        self.fetch()

  def drain(self) -> None:
    """Runs everything to its end."""
    while True:
      self.work()
      if self._in_flight:
        self.fetch()
      elif (place := self.first_waiting) is not None:
        self.start(place)
      else:
        return

  def fetch(self) -> None:
    """Waits for the oldest batch; its images leave or go on."""
    place, items, said, state, crops = self._in_flight.popleft()
    stop = self._stops[place]
    rows = np.asarray(said)[: len(items)]  # the rest is padding
    if crops is not None and len(crops) == self._batch:
      self._spare[crops.shape].append(crops)
    took = time.monotonic() - min(item.joined for item in items)
    self.seconds[place] = max(took, _FADES * self.seconds[place])
    if stop.option is None:
      self._begin(items, rows, state)
      return
    goes_on = np.ones(len(items), bool)
    if stop.position is not None:
      for item, row in zip(items, rows, strict=True):
        item.said.append(row)
        item.tried.append(stop.position)
      # What is known of each so far, [N, K].
      last = self._policy.answer == 'last'
      answers = np.stack(
        [x.said[-1] if last else pooled(x.said) for x in items]
      )
      probability, margin = signals(answers)
      sure = margin if self._policy.signal == 'margin' else probability
      goes_on = ~self._policy.leaves(stop.position, sure)
      for i in np.flatnonzero(goes_on):
        items[i].hurried = self._hurries(items[i], place + 1)
        goes_on[i] = not items[i].hurried
      if leaving := np.flatnonzero(~goes_on).tolist():
        self._done([items[i] for i in leaving], answers[leaving])
    kept = np.flatnonzero(goes_on).tolist()
    if kept:
      self._go_on(place + 1, items, kept, state)

  def _begin(self, items: list[Item], rows: np.ndarray, state: Any) -> None:
    """Sends images where the predictor's rows, log p of its options, say."""
    log_p = np.full((len(items), len(self._contract.options)), -np.inf)
    log_p[:, list(self._contract.routes)] = rows
    draw = None
    if self._policy.mixes:
      view = self._contract.predictor_view
      draw = np.array([checksum(item.picture.crop(view)) for item in items])
    first = self._policy.begin(log_p, draw, len(items))
    places = np.asarray(self._entries)[first]
    for place in np.unique(places).tolist():
      kept = np.flatnonzero(places == place).tolist()
      self._go_on(place, items, kept, state)

  def _go_on(
    self, place: int, items: list[Item], kept: list[int], state: Any
  ) -> None:
    """Lets those `kept` of a batch wait at a place, or run there at once."""
    queue = self.queues[place]
    if isinstance(queue, Waiting):
      for i in kept:
        self._join(place, items[i])
      return
    for i in kept:
      items[i].joined = time.monotonic()
    option = self._stops[place].option
    if self._alone and len(items) == 1 == self._engine.bucket(option, 1):
      self._run(place, items, state)  # nobody to wait for in a pool
      return
    queue.push(state, kept, [items[i] for i in kept])
    # A pool has room for one batch beside a full one.
    while len(queue.waiting) >= self._engine.best_batch:
      self.start(place)
