# SPDX-License-Identifier: Apache-2.0
"""Images that arrive one by one, answered in batches before a deadline.

Images that chose the same size wait for each other. A size runs when its batch
is full, or when one of its images must start now to be answered in time. A
batch that runs unfilled takes along images of smaller sizes that must start
too, and others where there would be padding: these run larger than they chose,
never smaller, and are counted as `spilled`.
"""

import collections
import concurrent.futures
import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from drnet_jax.serve.answers import Prediction
from drnet_jax.serve.picture import Picture

_PATIENCE_S = 0.05  # between looks for an end of the stream
_MOST_WAITING = 1000  # images; `submit` blocks where there are more


@dataclasses.dataclass
class Request:
  """An image on its way.

  Attributes:
    picture: the image.
    arrived: when, in seconds of the monotonic clock.
    future: gets the answer.
    view: crop for the predictor.
    chosen: index of the size chosen for it.
  """

  picture: Picture
  arrived: float
  future: concurrent.futures.Future
  view: np.ndarray | None = None
  chosen: int = 0


def take(
  waiting: Sequence[collections.deque],
  due: Sequence[bool],
  batch: int,
  bucket: Callable[[int], int],
) -> tuple[int, list] | None:
  """Decides what runs next; takes it off the queues.

  Args:
    waiting: one queue per size, ascending in size, oldest first.
    due: whether the oldest of each queue must start now.
    batch: the most that run at once.
    bucket: how many images are computed where so many are asked for.

  Returns:
    Index of the size and what to run there; None if all can wait. A full
    batch goes first, the largest size before the others. Otherwise the
    largest size that has something due takes along smaller sizes that are due
    too, and fills what would be padding with others; the next smaller first.
  """
  order = range(len(waiting) - 1, -1, -1)
  for j in order:
    if len(waiting[j]) >= batch:
      return j, [waiting[j].popleft() for _ in range(batch)]
  for j in order:
    if not due[j]:
      continue
    taken = list(waiting[j])
    waiting[j].clear()
    smaller = waiting[:j][::-1]
    for queue_, is_due in zip(smaller, due[:j][::-1], strict=True):
      while is_due and queue_ and len(taken) < batch:
        taken.append(queue_.popleft())
    slots = min(bucket(len(taken)), batch)
    for queue_ in smaller:
      while queue_ and len(taken) < slots:
        taken.append(queue_.popleft())
    return j, taken
  return None


class Stream:
  """Answers images as they arrive. Use it in a `with` statement.

  Args:
    classifier: what answers.
    deadline_ms: from `submit` to the answer. Met as long as the machine can;
      `late` counts the others.
    batch: the most that run at once.
    top_k: classes in an answer's `top`.

  Attributes:
    answered, late, spilled: counts of images.
  """

  def __init__(
    self, classifier: Any, *, deadline_ms: float, batch: int, top_k: int
  ):
    self._classifier = classifier
    self._deadline_s = deadline_ms / 1e3
    self._batch = batch
    self._top_k = top_k
    sizes = len(classifier.contract.resolutions)
    self._waiting: list[collections.deque] = [
      collections.deque() for _ in range(sizes)
    ]
    # How long a batch of each size lately took, for starting in time.
    self._seconds = [0.0] * sizes
    self._arrivals: queue.SimpleQueue = queue.SimpleQueue()
    self._latencies_s: collections.deque = collections.deque(maxlen=10_000)
    self.answered = self.late = self.spilled = 0
    self._room = threading.BoundedSemaphore(_MOST_WAITING)
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
      read. Blocks while very many are waiting.
    """
    self._room.acquire()
    picture = self._classifier.picture(source)
    request = Request(picture, time.monotonic(), concurrent.futures.Future())
    request.future.add_done_callback(lambda _: self._room.release())
    self._readers.submit(self._read, request)
    return request.future

  def latency_ms(self, percentiles: Sequence[float] = (50, 95, 99)) -> list:
    """Percentiles of the time from `submit` to the answer."""
    if not self._latencies_s:
      return [float('nan')] * len(percentiles)
    return list(1e3 * np.percentile(self._latencies_s, percentiles))

  def _read(self, request: Request) -> None:
    try:
      request.view = self._classifier.view(request.picture)
      self._arrivals.put(request)
    except Exception as error:  # a decoder may raise anything on rubbish
      request.future.set_exception(error)

  def _work(self) -> None:
    while True:
      arrived = self._collect()
      if arrived:
        self._guard(arrived, lambda: self._route(arrived))  # noqa: B023
      now = time.monotonic()
      closing = self._closing.is_set() and self._arrivals.empty()
      due = [
        bool(waiting) and (closing or self._start_by(waiting[0], j) <= now)
        for j, waiting in enumerate(self._waiting)
      ]
      bucket = self._classifier.engine.bucket
      taken = take(self._waiting, due, self._batch, bucket)
      if taken:
        self._guard(taken[1], lambda: self._run(*taken))  # noqa: B023
      elif closing:
        return

  def _guard(self, requests, work) -> None:
    """Does the work; what goes wrong is the answer to its requests."""
    try:
      work()
    except Exception as error:
      for request in requests:
        if not request.future.done():
          request.future.set_exception(error)

  def _start_by(self, request: Request, j: int) -> float:
    return request.arrived + self._deadline_s - self._seconds[j]

  def _collect(self) -> list[Request]:
    """What has arrived, after waiting for it as long as nothing is due."""
    starts = [
      self._start_by(waiting[0], j)
      for j, waiting in enumerate(self._waiting)
      if waiting
    ]
    patience = min([_PATIENCE_S, *(t - time.monotonic() for t in starts)])
    arrived: list[Request] = []
    try:
      while len(arrived) < self._batch:
        arrived.append(
          self._arrivals.get_nowait()
          if arrived or patience <= 0
          else self._arrivals.get(timeout=patience)
        )
    except queue.Empty:
      pass
    return arrived

  def _route(self, requests: list[Request]) -> None:
    choice = self._classifier.choose([r.view for r in requests])
    for request, j in zip(requests, choice.tolist(), strict=True):
      request.view, request.chosen = None, j
      self._waiting[j].append(request)

  def _run(self, j: int, requests: list[Request]) -> None:
    start = time.monotonic()
    crops, good = [], []
    for request in requests:
      try:
        crops.append(self._classifier.crop(request.picture, j))
        good.append(request)
      except Exception as error:  # as above
        request.future.set_exception(error)
    if not good:
      return
    rows = np.asarray(self._classifier.engine.probabilities(j, np.stack(crops)))
    end = time.monotonic()
    self._seconds[j] = max(end - start, 0.9 * self._seconds[j])
    for request, row in zip(good, rows, strict=False):
      answer = self._classifier.answer(row, j, request.chosen, self._top_k)
      self._count(request, answer, end)
      request.future.set_result(answer)

  def _count(self, request: Request, answer: Prediction, end: float) -> None:
    seconds = end - request.arrived
    self._latencies_s.append(seconds)
    self.answered += 1
    self.late += seconds > self._deadline_s
    self.spilled += answer.size_px > answer.chosen_px
