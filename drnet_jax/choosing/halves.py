# SPDX-License-Identifier: Apache-2.0
"""Policies set on one half of some images, scored on the other, many times.

For those who have one set of labelled images: no image is scored by a policy
that was set on it. The result is an estimate, not a policy to use.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from drnet_jax.choosing import scores, search
from drnet_jax.choosing.calibration import TOLERANCE, Calibration
from drnet_jax.choosing.record import Record

NO_BUDGET = float('inf')  # the policy that keeps the accuracy

_FAMILIES = ('best', 'router', 'cascade', 'routed_cascade')


def halves(
  record: Record, budgets: Sequence[float], *, splits: int, seed: int = 0
) -> list[dict[str, Any]]:
  """What each family gives at each budget, and `best` without one.

  Args:
    record: of the images.
    budgets: average costs to stay within on the half that policies are set on.
    splits: times to divide the groups of images in two.
    seed: of the divisions.

  Returns:
    A row for each split, half, budget (NO_BUDGET the last) and family that has
    a policy for it:
    'split', 'half', 'budget', 'family', and of the other half 'gmacs', 'top1',
    'best_fixed' (the hull of all fixed options at that cost) and 'largest'
    (top-1 of the most expensive option).
  """
  groups = record.groups
  count = groups.max() + 1
  rows = []
  for split in range(splits):
    drawn = np.random.default_rng((seed, split)).permutation(count)
    is_first = np.isin(groups, drawn[: count // 2])
    # Each half in its turn: then all images are scored, whatever the luck.
    for half, ours in enumerate((is_first, ~is_first)):
      for row in _scored(record.some(ours), record.some(~ours), budgets):
        rows.append({'split': split, 'half': half} | row)
  return rows


def _scored(ours: Record, theirs: Record, budgets: Sequence[float]):
  """Policies set on `ours`, scored on `theirs`: yields a row for each."""
  calibration = Calibration.of(ours, split='')
  found = calibration.points['GMACs']
  largest = float(theirs.top1[:, theirs.gmacs.argmax()].mean())
  points = [
    (budget, family, search.within(found.get(family, ()), budget))
    for budget in budgets
    for family in _FAMILIES
  ]
  for budget, family, point in [
    *points,
    (NO_BUDGET, 'best', calibration.find()),
  ]:
    if point:
      score = scores.score(point.policy, theirs, family)
      yield {
        'budget': budget,
        'family': family,
        'gmacs': score.gmacs,
        'top1': score.top1,
        'best_fixed': scores.hull_top1(theirs, score.gmacs),
        'largest': largest,
      }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Means of the rows of `halves`, a row for each budget and family.

  'gain' is over the best fixed option, in top-1; 'gain_least' and 'gain_most'
  are that of one split, of 'splits'. 'kept' is the share of the halves in which
  a policy is within TOLERANCE of the most expensive option.
  """
  several = collections.defaultdict(list)
  for row in rows:
    several[row['budget'], row['family']].append(row)
  found = []
  for (budget, family), some in several.items():
    by_split = collections.defaultdict(list)
    for row in some:
      by_split[row['split']].append(row['top1'] - row['best_fixed'])
    gains = [float(np.mean(both)) for both in by_split.values()]
    means = {
      name: float(np.mean([row[name] for row in some]))
      for name in ('gmacs', 'top1', 'best_fixed', 'largest')
    }
    kept = [row['top1'] >= row['largest'] - TOLERANCE for row in some]
    found.append(
      {'budget': budget, 'family': family}
      | means
      | {
        'gain': float(np.mean(gains)),
        'gain_least': min(gains),
        'gain_most': max(gains),
        'splits': len(gains),
        'kept': float(np.mean(kept)),
      }
    )
  return found
