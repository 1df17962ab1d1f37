# SPDX-License-Identifier: Apache-2.0
"""Images that arrive one by one, answered in batches before a deadline.

A place of the schedule runs when its batch is full, or when one of its images
must start now to be answered in time, the options that may still follow
counted. A batch that runs unfilled takes along images that wait for earlier
options and must start too, and others where there would be padding: these run
further along the path than their policy asked, never less far, and are counted
as `spilled`.
"""

import collections
import concurrent.futures
import contextlib
import functools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from drnet_jax.serve.answers import prediction
from drnet_jax.serve.schedule import Item, Schedule, Waiting

_PATIENCE_S = 0.05  # between looks for an end of the stream
_MOST_WAITING = 1000  # images; `submit` blocks where there are more


class Request(NamedTuple):
  """An image that was handed in: when, and who gets its answer."""

  arrived: float  # in seconds of the monotonic clock
  future: concurrent.futures.Future


def take(
  waiting: Sequence[collections.deque],
  place: int,
  due: Sequence[bool],
  batch: int,
  bucket: Callable[[int], int],
) -> list:
  """Takes off the queues what runs at a place.

  Args:
    waiting: one queue per place, in the order of the path, oldest first.
    place: that has a full batch, or something due.
    due: whether the oldest of each queue must start now.
    batch: the most that run at once.
    bucket: how many images are computed where so many are asked for.

  Returns:
    Images of the place; with them what is due at earlier ones, and in place of
    padding others, the nearest earlier place first.
  """
  own = waiting[place]
  taken = [own.popleft() for _ in range(min(len(own), batch))]
  earlier = waiting[:place][::-1]
  for queue_, is_due in zip(earlier, due[:place][::-1], strict=True):
    while is_due and queue_ and len(taken) < batch:
      taken.append(queue_.popleft())
  slots = min(bucket(len(taken)), batch)
  for queue_ in earlier:
    while queue_ and len(taken) < slots:
      taken.append(queue_.popleft())
  return taken


class Stream:
  """Answers images as they arrive. Use it in a `with` statement.

  Args:
    classifier: what answers, by the policy it has now.
    deadline_ms: from `submit` to the answer. Met as long as the machine can;
      `late` counts the others.
    batch: the most images that run at once; 0 for what suits the device.
    top_k: classes in an answer's `top`.

  Attributes:
    answered, late, spilled: counts of images.
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
    self._schedule: Schedule = classifier.schedule(
      batch=self._batch, done=self._answer
    )
    self._stops = self._schedule.stops
    # How long a batch of each place lately took, for starting in time.
    self._seconds = [0.0] * len(self._stops)
    self._arrivals: queue.SimpleQueue = queue.SimpleQueue()
    self._latencies_s: collections.deque = collections.deque(maxlen=10_000)
    self.answered = self.late = self.spilled = 0
    self._room = threading.BoundedSemaphore(_MOST_WAITING)
    self._open: set[Item] = set()  # whose futures are not done
    self._closing = threading.Event()
    self._readers = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    self._worker = threading.Thread(target=self._work, daemon=True)

  def __enter__(self) -> 'Stream':
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
      read, and can be cancelled until the image is routed. Blocks while very
      many are waiting.
    """
    self._room.acquire()
    request = Request(time.monotonic(), concurrent.futures.Future())
    request.future.add_done_callback(lambda _: self._room.release())
    item = Item(request, self._classifier.picture(source))
    self._open.add(item)
    request.future.add_done_callback(lambda _: self._open.discard(item))
    try:
      self._readers.submit(self._read, item)
    except RuntimeError:  # the stream has ended
      request.future.cancel()
      raise
    return request.future

  def latency_ms(self, percentiles: Sequence[float] = (50, 95, 99)) -> list:
    """Percentiles of the milliseconds from `submit` to the answer."""
    seconds = np.percentile(self._latencies_s or [np.nan], percentiles)
    return list(1e3 * seconds)

  def _read(self, item: Item) -> None:
    try:
      item.picture.cut(self._schedule.asked)
    except Exception as error:  # a decoder may raise anything on rubbish
      if item.key.future.set_running_or_notify_cancel():
        item.key.future.set_exception(error)
    else:
      self._arrivals.put(item)

  def _work(self) -> None:
    places = range(len(self._stops))
    while True:
      if arrived := self._collect():
        self._guard(arrived, functools.partial(self._schedule.admit, arrived))
      now = time.monotonic()
      closing = self._closing.is_set() and self._arrivals.empty()
      due = [self._start_by(place) <= now for place in places]
      place = self._schedule.full()
      if place is None:
        place = next((p for p in reversed(places) if due[p]), None)
      if place is None and closing:
        # The first goes first, so that those who go on join the next.
        place = self._schedule.first_waiting
        if place is None:
          return
      if place is not None:
        self._run(place, due)

  def _run(self, place: int, due: Sequence[bool]) -> None:
    """Runs a batch of a place, with what `take` takes along."""
    queues = self._schedule.queues
    items, taken = list(queues[place].waiting), None
    if isinstance(queues[place], Waiting):
      # An image can be taken further along as a crop, not into the features of
      # a network with exits.
      crops = [
        q.waiting if isinstance(q, Waiting) else collections.deque()
        for q in queues
      ]
      bucket = functools.partial(self._engine.bucket, self._stops[place].option)
      taken = take(crops, place, due, self._batch, bucket)
      for item in taken[len(items) :]:  # after those of the place
        item.spilled = True
      items = taken
    start = time.monotonic()
    self._guard(items, lambda: self._schedule.run(place, taken))
    took = time.monotonic() - start
    self._seconds[place] = max(took, 0.9 * self._seconds[place])

  def _guard(self, items: Sequence[Item], work: Callable[[], None]) -> None:
    """Does the work; what goes wrong is the answer to its images."""
    try:
      work()
    except Exception as error:
      held = self._schedule.held()
      # Batches of later stages may have begun within: theirs wait nowhere.
      lost = [
        item for item in self._open.copy() if item.policy and item not in held
      ]
      for item in [*items, *lost]:
        if not item.key.future.done():
          item.key.future.set_exception(error)

  def _start_by(self, place: int) -> float:
    """When the oldest image of a place must start to be answered in time."""
    waiting = self._schedule.queues[place].waiting
    if not waiting:
      return math.inf
    left = max(self._seconds)  # of a batch that may run as it falls due
    for stop, seconds in zip(
      self._stops[place:], self._seconds[place:], strict=True
    ):
      left += seconds
      if stop.certain:
        break
    oldest = min(item.key.arrived for item in waiting)
    return oldest + self._deadline_s - left

  def _collect(self) -> list[Item]:
    """What has arrived, after waiting for it as long as nothing is due."""
    start = min(self._start_by(place) for place in range(len(self._stops)))
    patience = min(_PATIENCE_S, start - time.monotonic())
    if self._closing.is_set() or self._schedule.full() is not None:
      patience = 0.0
    arrived: list[Item] = []
    with contextlib.suppress(queue.Empty):
      if patience > 0:
        arrived.append(self._arrivals.get(timeout=patience))
      while len(arrived) < self._batch:
        arrived.append(self._arrivals.get_nowait())
    # Those that were cancelled are out; from here on none can be.
    return [x for x in arrived if x.key.future.set_running_or_notify_cancel()]

  def _answer(self, item: Item, probabilities: np.ndarray) -> None:
    request = item.key
    try:
      answer = prediction(
        self._classifier.contract, item, probabilities, self._top_k
      )
    except Exception as error:
      request.future.set_exception(error)
      return
    seconds = time.monotonic() - request.arrived
    self._latencies_s.append(seconds)
    self.answered += 1
    self.late += seconds > self._deadline_s
    self.spilled += answer.spilled
    request.future.set_result(answer)
