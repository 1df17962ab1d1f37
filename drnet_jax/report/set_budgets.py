# SPDX-License-Identifier: Apache-2.0
"""Calibrated runs of a set beside networks that were trained for one size each.

The hull of a run's own fixed sizes is a rival that shares its weights. A
network for each size, trained alone, is what a user could have instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drnet_jax import tables
from drnet_jax.choosing import scores
from drnet_jax.choosing.policy import describe
from drnet_jax.choosing.scores import Interval
from drnet_jax.report import plots, wording
from drnet_jax.report.evaluated import Checked, EvaluatedRun
from drnet_jax.report.page import Section, Table

_SHOWN = 8  # budgets of a run; the csv has all


class Budget(NamedTuple):
  """The best policy of a run within a budget, on the test images.

  Attributes:
    checked: the policy and its score.
    over_best_fixed: its top-1 less that of the best fixed size, or mixture of
      two, of the same weights at its cost.
    networks: of one size: which images each classifies correctly, bool [N, M],
      and their costs, [M]; None without any.
    over_networks: as `over_best_fixed`, of these networks.
  """

  name: str
  run: EvaluatedRun
  checked: Checked
  over_best_fixed: Interval
  networks: tuple[np.ndarray, np.ndarray] | None
  over_networks: Interval | None


def of(runs: Mapping[str, EvaluatedRun]) -> list[Budget]:
  """Every policy that is best for some budget of a calibrated run."""
  found = []
  for name, run in runs.items():
    record = run.record
    if len(record.options) < 2:
      continue
    networks = _of_one_size(run, runs)
    policies = {}
    for checked in run.budgets.get('best', ()):
      policies.setdefault(checked.point.policy, checked)
    for policy, checked in policies.items():
      ours = scores.over_networks(record, policy, record.top1, record.gmacs)
      theirs = networks and scores.over_networks(record, policy, *networks)
      found.append(Budget(name, run, checked, ours, networks, theirs))
  return found


def _of_one_size(
  run: EvaluatedRun, runs: Mapping[str, EvaluatedRun]
) -> tuple[np.ndarray, np.ndarray] | None:
  records = [
    other.record
    for other in runs.values()
    if len(other.record.options) == 1
    and other.setting == run.setting
    and run.record.is_of_images_of(other.record)
  ]
  if not records:
    return None
  right = np.concatenate([record.top1 for record in records], 1)
  return right, np.concatenate([record.gmacs for record in records])


def section(budgets: Sequence[Budget]) -> Section:
  """For people, some of each run."""
  rows = []
  for name in dict.fromkeys(budget.name for budget in budgets):
    mine = [budget for budget in budgets if budget.name == name]
    places = np.linspace(0, len(mine) - 1, min(_SHOWN, len(mine))).round()
    rows += [_cells(mine[int(i)]) for i in places]
  return Section(
    title='The best policy for each budget',
    text=[
      'Found on held-out images, scored on the test images, everything '
      'counted. The best fixed size is that of the same weights; networks of '
      'one size are the rows trained for one size each. Of both, the best or '
      'a mixture of two, at the cost of the policy.'
    ],
    figures={'budgets': _figure(budgets)},
    table=Table.of(
      rows, note='Brackets: 95 % bootstrap intervals over the test images.'
    ),
  )


def _figure(budgets: Sequence[Budget]) -> str:
  """Top-1 over cost: policies, fixed sizes, and networks of one size."""
  scale, unit = wording.unit(budgets[0].run.record)
  policies, fixed = {}, {}

  def hull(right: np.ndarray, gmacs: np.ndarray):
    cost, top1 = scores.upper_hull(gmacs, right.mean(0))
    return scale * cost, 100 * top1

  for budget in budgets:
    got, record = budget.checked.got, budget.run.record
    cost, top1 = policies.setdefault(budget.name, ([], []))
    cost.append(scale * got.gmacs)
    top1.append(100 * got.top1)
    fixed[budget.name] = hull(record.top1, record.gmacs)
    if budget.networks:
      fixed[f'{budget.run.network} of one size'] = hull(*budget.networks)
  return plots.budgets(policies, fixed, f'average cost of an image, {unit}')


def _cells(budget: Budget) -> dict[str, str]:
  record, got = budget.run.record, budget.checked.got
  return {
    '': budget.name,
    '% of full': wording.percent(got.gmacs / record.costs.full),
    'top-1, %': wording.percent(got.top1),
    'over best fixed, points': wording.points(budget.over_best_fixed),
    'over networks of one size, points': wording.points(budget.over_networks),
    'policy': describe(budget.checked.point.policy, record.options),
  }


def csv_row(budget: Budget) -> dict[str, Any]:
  """Raw values."""
  record, (allowed, point, got) = budget.run.record, budget.checked
  row = {
    'row': budget.name,
    'budget_gmacs': allowed,
    'gmacs': got.gmacs,
    'share_of_full': got.gmacs / record.costs.full,
    'top1': got.top1,
  }
  for name in ('over_best_fixed', 'over_networks'):
    row |= tables.interval(name, getattr(budget, name))
  return row | {'policy': describe(point.policy, record.options)}
