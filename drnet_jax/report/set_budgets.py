# SPDX-License-Identifier: Apache-2.0
"""Calibrated runs of a set beside networks that were trained for one size each.

The hull of a run's own fixed sizes is a rival that shares its weights. A
network for each size, trained alone, is what a user could have instead.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drnet_jax.choosing import scores
from drnet_jax.choosing.policy import describe
from drnet_jax.choosing.scores import Interval
from drnet_jax.report import wording
from drnet_jax.report.evaluated import Checked, EvaluatedRun
from drnet_jax.report.page import Section, Table

_SHOWN = 8  # budgets of a run; the csv has all


@dataclasses.dataclass(frozen=True)
class Budget:
  """The best policy of a run within a budget, on the test images.

  Attributes:
    name: of the run.
    run: what was evaluated.
    checked: the policy and its score.
    over_fixed: its top-1 less that of the best fixed size, or mixture of two,
      of the same weights at its cost.
    over_networks: the same of the networks of one size; None without any.
  """

  name: str
  run: EvaluatedRun
  checked: Checked
  over_fixed: Interval
  over_networks: Interval | None


def of(runs: Mapping[str, EvaluatedRun]) -> list[Budget]:
  """Every policy that is best for some budget of a calibrated run."""
  found = []
  for name, run in runs.items():
    if len(run.record.options) < 2:
      continue
    rivals = _rivals(run, runs)
    policies = {}
    for checked in run.budgets.get('best', ()):
      policies.setdefault(checked.point.policy, checked)
    found += [_budget(name, run, c, rivals) for c in policies.values()]
  return found


def _rivals(
  run: EvaluatedRun, runs: Mapping[str, EvaluatedRun]
) -> list[EvaluatedRun]:
  return [
    other
    for other in runs.values()
    if len(other.record.options) == 1
    and (other.data, other.network) == (run.data, run.network)
    and is_on_same_images(run, other)
  ]


def is_on_same_images(ours: EvaluatedRun, theirs: EvaluatedRun) -> bool:
  """Whether two runs were tested on the same images."""
  records = ours.record, theirs.record
  return all(
    np.array_equal(*(get(r) for r in records))
    for get in (lambda r: r.label, lambda r: r.extra.get('index'))
  )


def _budget(
  name: str,
  run: EvaluatedRun,
  checked: Checked,
  rivals: Sequence[EvaluatedRun],
) -> Budget:
  record, policy = run.record, checked.point.policy

  def over(right: np.ndarray, gmacs: np.ndarray) -> Interval:
    return scores.over_networks(record, policy, right, gmacs)

  over_networks = None
  if rivals:
    records = [other.record for other in rivals]
    over_networks = over(
      np.concatenate([r.top1 for r in records], 1),
      np.concatenate([r.gmacs for r in records]),
    )
  over_fixed = over(record.top1, record.gmacs)
  return Budget(name, run, checked, over_fixed, over_networks)


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
    tables=[
      Table(
        header=[
          '',
          '% of full',
          'top-1, %',
          'over best fixed, points',
          'over networks of one size, points',
          'policy',
        ],
        rows=rows,
        note='Brackets: 95 % bootstrap intervals over the test images.',
      )
    ],
  )


def _cells(budget: Budget) -> list[str]:
  record, got = budget.run.record, budget.checked.got
  networks = budget.over_networks
  return [
    budget.name,
    wording.percent(got.gmacs / record.costs.full),
    wording.percent(got.top1),
    wording.points(budget.over_fixed),
    wording.points(networks) if networks else '',
    describe(budget.checked.point.policy, record.options),
  ]


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
  for name in ('over_fixed', 'over_networks'):
    around = getattr(budget, name)
    value = dataclasses.asdict(around) if around else {}
    row[name] = value.get('value', '')
    row[f'{name}_low'] = value.get('low', '')
    row[f'{name}_high'] = value.get('high', '')
  return row | {'policy': describe(point.policy, record.options)}
