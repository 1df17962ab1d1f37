# SPDX-License-Identifier: Apache-2.0
"""Thresholds of exits by the rule of RANet's authors: shares to leave at each.

An image leaves at the first exit whose largest probability is at least the
exit's threshold. A share of the held-out images, falling or rising
geometrically from exit to exit, is to leave at each; sweeping the ratio gives
the papers' curves of budgeted batch classification. `search` finds thresholds
that are at least as good; these are for holding ours against theirs.

Source: the authors' code of RANet (arXiv:2003.07326) and of MSDNet before it.
"""

from collections.abc import Sequence

import numpy as np

from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.record import Record

# The ratios of the papers' curves.
RATIOS = tuple(p / 20 for p in range(1, 40))


def geometric_shares(ratio: float, exits: int) -> np.ndarray:
  """Shares of the images to leave at each exit: ratio^k, adding up to 1."""
  powers = (np.arange(exits) - (exits - 1) * (ratio > 1)) * np.log(ratio)
  return np.exp(powers) / np.exp(powers).sum()


def thresholds(confidence: np.ndarray, shares: Sequence[float]) -> np.ndarray:
  """Thresholds [E - 1] by which shares [E] of images leave; inf for none.

  Of images of confidence [N, E]; at the last exit all leave. Ties leave
  together, so more may leave than were to; where fewer images are left than are
  to leave, none does, but all go on (as in the authors' code).
  """
  count, exits = confidence.shape
  found = np.full(exits - 1, np.inf)
  gone = np.zeros(count, bool)
  for k in range(exits - 1):
    # In float32, as theirs.
    wanted = int(np.floor(np.float32(count) * np.float32(shares[k])))
    left = np.sort(confidence[~gone, k])[::-1]
    if 1 <= wanted <= len(left):
      found[k] = left[wanted - 1]
    gone |= confidence[:, k] >= found[k]
  return found


def by_ratio(record: Record, ratio: float) -> Policy:
  """The policy of a ratio, its thresholds set on held-out images."""
  exits = len(record.options)
  shares = geometric_shares(ratio, exits)
  limits = tuple(thresholds(record.confidence[:, :exits], shares).tolist())
  return Policy(tuple(range(exits)), stop=limits, signal='probability')
