# SPDX-License-Identifier: Apache-2.0
"""Images that arrive one by one, answered before a deadline.

Whenever the device has room, the image that came first starts, and what waits
beside it for the same option runs with it; before it is run for the first time
it waits while others are being read, up to half of its time. So a batch is as
large as the load makes it: one image where there is little to do, full where
there is much. An image whose policy sends it on while there is no time left for
that leaves with what is known of it by then, and is counted as `hurried`: under
too much load accuracy gives way before the deadline does.
"""

import collections
import concurrent.futures
import contextlib
import functools
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from drnet_jax.serve.answers import predictions
from drnet_jax.serve.engines import cores
from drnet_jax.serve.schedule import Item, Schedule

_PATIENCE_S = 0.05  # between looks for an end of the stream
_MOST_WAITING = 1000  # images; `submit` blocks where there are more
_RESERVE = 0.25  # of the deadline, for what is slower than the last batches
_DOUBT = 0.95  # of how slow a place was, for each image that found all idle


class Request(NamedTuple):
  """An image that was handed in: when, and who gets its answer."""

  arrived: float  # in seconds of the monotonic clock
  future: concurrent.futures.Future


class Stream:
  """Answers images as they arrive. Use it in a `with` statement.

  Args:
    classifier: what answers, by the policy it has now.
    deadline_ms: from `submit` to the answer; `late` counts what comes after. An
      image runs at its first option however late it is.
    batch: the most images that run at once; 0 for what suits the device.
    top_k: classes in an answer's `top`.

  Attributes:
    answered, late, hurried: counts of images.
  """

  def __init__(
    self, classifier: Any, *, deadline_ms: float, batch: int, top_k: int
  ):
    self._classifier = classifier
    self._engine = classifier.engine
    self._deadline_s = deadline_ms / 1e3
    most = classifier.engine.best_batch
    self._batch = min(batch or most, most)
    self._top_k = top_k
    self._schedule = Schedule(
      classifier.engine,
      classifier.contract,
      classifier.policy,
      self._batch,
      self._answer,
      self._hurries,
    )
    self._arrivals: queue.SimpleQueue = queue.SimpleQueue()
    self._latencies_s: collections.deque = collections.deque(maxlen=10_000)
    self.answered = self.late = self.hurried = 0
    self._room = threading.BoundedSemaphore(_MOST_WAITING)
    self._open: set[Item] = set()  # whose futures are not done
    self._unread: set[Item] = set()
    self._closing = threading.Event()
    self._readers = concurrent.futures.ThreadPoolExecutor(cores())
    self._worker = threading.Thread(target=self._work, daemon=True)

  def __enter__(self) -> 'Stream':
    self._schedule.warm_up()
    self._worker.start()
    return self

  def __exit__(self, *_) -> None:
    """Answers what is still waiting, then ends."""
    self._readers.shutdown()
    self._closing.set()
    self._worker.join()

  def submit(self, source: Any) -> concurrent.futures.Future:
    """Hands in an image.

    Args:
      source: as for `Classifier.predict`.

    Returns:
      A future of its `Prediction`; it raises UserError if the image cannot be
      read, and can be cancelled until the image is let in. Blocks while very
      many are waiting.
    """
    arrived = time.monotonic()
    self._room.acquire()
    request = Request(arrived, concurrent.futures.Future())
    request.future.add_done_callback(lambda _: self._room.release())
    item = Item(request, self._classifier.picture(source))
    self._open.add(item)
    self._unread.add(item)
    request.future.add_done_callback(lambda _: self._open.discard(item))
    try:
      self._readers.submit(self._read, item)
    except RuntimeError:  # the stream has ended, or is about to
      self._unread.discard(item)
      request.future.cancel()
      raise
    return request.future

  def latency_ms(self, percentiles: Sequence[float] = (50, 95, 99)) -> list:
    """Percentiles of the milliseconds from `submit` to the answer."""
    seconds = np.percentile(self._latencies_s or [np.nan], percentiles)
    return list(1e3 * seconds)

  def _read(self, item: Item) -> None:
    wrong = None
    try:
      item.picture.cut(self._schedule.asked)
    except Exception as error:  # a decoder may raise anything on rubbish
      wrong = error
    self._arrivals.put((item, wrong))
    self._unread.discard(item)

  def _work(self) -> None:
    schedule = self._schedule
    while True:
      start, place = self._next()
      idle = 0.0 if schedule.in_flight else start - time.monotonic()
      if arrived := self._collect(min(idle, _PATIENCE_S)):
        self._guard(functools.partial(schedule.admit, arrived))
        start, place = self._next()
      room = schedule.in_flight < self._engine.in_flight
      if room and start <= time.monotonic():
        self._guard(functools.partial(schedule.start, place))
      elif schedule.in_flight:
        self._guard(schedule.fetch)
      elif self._closing.is_set() and place is None and self._arrivals.empty():
        return

  def _next(self) -> tuple[float, int | None]:
    """When to start what next, and where: the image that came first of all.

    At once if its batch is full or no other image is about to come, or else
    when half of its time is over. The predictor goes before all of them: what
    it says fills their batches.
    """
    found: tuple[float, int | None] = (math.inf, None)
    for place, queue_ in enumerate(self._schedule.queues):
      if queue_.waiting:
        if place == 0 and self._schedule.predicts:
          return 0.0, place
        oldest = min(item.key.arrived for item in queue_.waiting)
        full = len(queue_.waiting) >= self._batch
        is_new = not any(item.tried for item in queue_.waiting)
        waits = self._unread and is_new and not full
        start = oldest + self._deadline_s / 2 if waits else oldest
        found = min(found, (start, place))
    return found

  def _collect(self, patience_s: float) -> list[Item]:
    """Images that have arrived, after so long a wait for one."""
    arrived = []
    with contextlib.suppress(queue.Empty):
      if patience_s > 0 and not self._closing.is_set():
        arrived.append(self._arrivals.get(timeout=patience_s))
      while len(arrived) < self._batch:
        arrived.append(self._arrivals.get_nowait())
    good = []
    for item, wrong in arrived:
      # Those that were cancelled are out; from here on none can be.
      if item.key.future.set_running_or_notify_cancel():
        if wrong is None:
          good.append(item)
        else:
          item.key.future.set_exception(wrong)
    return good

  def _guard(self, work: Callable[[], None]) -> None:
    """Does the work; what goes wrong is the answer to its images."""
    try:
      work()
    except Exception as error:
      held = self._schedule.held()
      for item in self._open.copy():
        # Let in, and now neither waiting nor under way.
        if item.key.future.running() and item not in held:
          item.key.future.set_exception(error)

  def _hurries(self, item: Item, place: int) -> bool:
    """Whether there is no time left for an image to run at a place."""
    schedule = self._schedule
    end = item.key.arrived + (1 - _RESERVE) * self._deadline_s
    left = end - time.monotonic()
    if left >= schedule.seconds[place]:
      return False
    if not schedule.in_flight and schedule.first_waiting is None:
      # Nothing keeps this place busy: what slowed it down may be over.
      schedule.seconds[place] *= _DOUBT
    return True

  def _answer(self, items: list[Item], probabilities: np.ndarray) -> None:
    contract = self._classifier.contract
    for i, item in enumerate(items):
      request, row = item.key, probabilities[i : i + 1]
      try:  # each by itself, so that a NaN is no other image's failure
        (answer,) = predictions(contract, [item], row, self._top_k)
      except Exception as error:
        request.future.set_exception(error)
        continue
      seconds = time.monotonic() - request.arrived
      self._latencies_s.append(seconds)
      self.answered += 1
      self.late += seconds > self._deadline_s
      self.hurried += answer.hurried
      request.future.set_result(answer)
