# SPDX-License-Identifier: Apache-2.0
"""Budgeted batch classification: which images leave a network at which exit.

An image leaves at the first exit whose confidence (the largest probability) is
at least the exit's threshold. Thresholds come from images that were not trained
on: a share of them, falling or rising geometrically from exit to exit, is to
leave at each. Sweeping the ratio gives a curve of accuracy against cost.

Source: the authors' code of RANet (arXiv:2003.07326) and of MSDNet before it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from drnet_jax.report.policies import Policy, Record

# The ratios of the papers' curves.
RATIOS = tuple(p / 20 for p in range(1, 40))


@dataclasses.dataclass(frozen=True)
class Setting:
  """Thresholds, and what they give on two sets of images.

  Attributes:
    ratio: share of images that leave at an exit over that of the exit before.
    thresholds: [E]; the last is -inf.
    calibrated: on the images that the thresholds were set on.
    tested: on others.
  """

  ratio: float
  thresholds: np.ndarray
  calibrated: Policy
  tested: Policy


def geometric_shares(ratio: float, exits: int) -> np.ndarray:
  """Shares of the images to leave at each exit: ratio^k, adding up to 1."""
  powers = (np.arange(exits) - (exits - 1) * (ratio > 1)) * np.log(ratio)
  return np.exp(powers) / np.exp(powers).sum()


def thresholds(confidence: np.ndarray, shares: Sequence[float]) -> np.ndarray:
  """Thresholds by which these shares of some images leave.

  Ties leave together, so more may leave than were to; where fewer images are
  left than are to leave, none does, but all go on (as in the authors' code).

  Args:
    confidence: [N, E].
    shares: [E].

  Returns:
    [E]; inf where nobody leaves, -inf at the last exit.
  """
  count, exits = confidence.shape
  found = np.full(exits, np.inf)
  found[-1] = -np.inf
  gone = np.zeros(count, bool)
  for k in range(exits - 1):
    # In float32, as theirs.
    wanted = int(np.floor(np.float32(count) * np.float32(shares[k])))
    left = np.sort(confidence[~gone, k])[::-1]
    if 1 <= wanted <= len(left):
      found[k] = left[wanted - 1]
    gone |= confidence[:, k] >= found[k]
  return found


def leave_at(confidence: np.ndarray, limits: np.ndarray) -> np.ndarray:
  """Index of the exit at which each image leaves, int [N].

  Args:
    confidence: [N, E].
    limits: thresholds, [E].
  """
  return (confidence >= limits).argmax(1)


def score(
  limits: np.ndarray,
  gmacs: np.ndarray,
  confidence: np.ndarray,
  top1: np.ndarray,
  top5: np.ndarray | None = None,
) -> Policy:
  """What thresholds give on some images.

  Args:
    limits: thresholds, [E].
    gmacs: cost up to each exit, [E].
    confidence: [N, E].
    top1, top5: bool [N, E], whether each exit is right.

  Returns:
    The score; its shares are of the images at each exit.
  """
  left_at = leave_at(confidence, limits)
  rows = np.arange(len(left_at))
  return Policy(
    name='early exit',
    gmacs=float(gmacs[left_at].mean()),
    top1=float(top1[rows, left_at].mean()),
    top5=None if top5 is None else float(top5[rows, left_at].mean()),
    shares=np.bincount(left_at, minlength=len(gmacs)) / len(rows),
  )


def sweep(
  confidence: np.ndarray,
  top1: np.ndarray,
  test: Record,
  ratios: Sequence[float] = RATIOS,
) -> list[Setting]:
  """The curve of a network.

  Args:
    confidence, top1: [N, E], on images that were not trained on; thresholds
      know no others.
    test: of the images to report.
    ratios: as `RATIOS`.
  """
  found = []
  for ratio in ratios:
    shares = geometric_shares(ratio, len(test.gmacs))
    limits = thresholds(confidence, shares)
    found.append(
      Setting(
        ratio,
        limits,
        score(limits, test.gmacs, confidence, top1),
        score(limits, test.gmacs, test.confidence, test.top1, test.top5),
      )
    )
  return found


def best_of(
  curves: Sequence[Sequence[Setting]],
) -> list[tuple[int, Setting]]:
  """The best of several networks at each budget, ascending in cost.

  Which is best is read off the calibration images; what it scores, off others.

  Args:
    curves: a sweep of each network.

  Returns:
    The index of the network and the setting, wherever paying more gives more.
  """
  pool = [(i, setting) for i, curve in enumerate(curves) for setting in curve]
  pool.sort(key=lambda x: (x[1].calibrated.gmacs, -x[1].calibrated.top1))
  found, best = [], -1.0
  for i, setting in pool:
    if setting.calibrated.top1 > best:
      found.append((i, setting))
      best = setting.calibrated.top1
  return found
