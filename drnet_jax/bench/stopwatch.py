# SPDX-License-Identifier: Apache-2.0
"""Timing several things on a machine that changes its speed."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

# Turn of a network by itself, which may take less than a millisecond.
OF_A_NETWORK_S = 0.03


def interleaved(
  jobs: dict[Any, Callable[[], Any]],
  rounds: int,
  what: str,
  *,
  least_s: float = 0.0,
) -> dict[Any, np.ndarray]:
  """Runs jobs in turn: seconds of each, [rounds].

  Args:
    jobs: each returns once it is done.
    rounds: timed ones; one more comes first, untimed.
    what: for the progress bar.
    least_s: a job that takes less has a turn of that many seconds, again and
      again as in use: after others it finds caches cold and threads asleep.
  """
  seconds: dict[Any, list[float]] = {name: [] for name in jobs}
  times = dict.fromkeys(jobs, 1)
  for turn in tqdm(range(rounds + 1), what, leave=False, disable=None):
    for name, job in jobs.items():
      if not turn and least_s:
        job()  # makes what it needs
      start = time.perf_counter()
      for _ in range(times[name]):
        job()
      taken = (time.perf_counter() - start) / times[name]
      if turn:
        seconds[name].append(taken)
      elif taken < least_s:
        times[name] = math.ceil(least_s / taken)
  return {name: np.asarray(s) for name, s in seconds.items()}


def ms(seconds: np.ndarray, count: int) -> float:
  """Median milliseconds of an image, from `seconds` of `count`, [rounds]."""
  return 1e3 * float(np.median(seconds)) / count


def speed_up(
  base: np.ndarray, seconds: np.ndarray, implied: float
) -> dict[str, float]:
  """How many times as fast as a base; of both the seconds, [rounds], are given.

  `implied` is what their multiply-adds say. Returns columns of a table.
  """
  realised = float(np.median(base / seconds))
  return {
    'implied': implied,
    'realised': realised,
    'realised_of_implied': realised / implied,
  }
