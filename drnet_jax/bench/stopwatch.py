# SPDX-License-Identifier: Apache-2.0
"""Timing several things on a machine that changes its speed."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm


def interleaved(
  jobs: dict[Any, Callable[[], Any]], rounds: int, what: str
) -> dict[Any, np.ndarray]:
  """Runs jobs in turn: seconds of each, [rounds].

  Args:
    jobs: each returns once it is done.
    rounds: timed ones; one more comes first, untimed.
    what: for the progress bar.
  """
  seconds: dict[Any, list[float]] = {name: [] for name in jobs}
  for turn in tqdm(range(rounds + 1), what, leave=False, disable=None):
    for name, job in jobs.items():
      start = time.perf_counter()
      job()
      if turn:
        seconds[name].append(time.perf_counter() - start)
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
