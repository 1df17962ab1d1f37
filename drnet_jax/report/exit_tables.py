# SPDX-License-Identifier: Apache-2.0
"""Budgeted batch classification as a table, a csv and a figure."""

import csv
import os
from collections.abc import Sequence

from drnet_jax import terminal
from drnet_jax.report import exits, figures, paper_curves, policies
from drnet_jax.report.exits import Setting
from drnet_jax.report.policies import Record


def write(
  directory: str,
  names: Sequence[str],
  curves: Sequence[Sequence[Setting]],
  record: Record,
  data_name: str,
) -> str:
  """Leaves `budget.csv`, `budget.md` and the figure `budget` in a folder.

  Args:
    directory: made if it is not there.
    names: of the networks.
    curves: a sweep of each.
    record: of the first network on the test images.
    data_name: of the data set; the paper's curves are drawn beside ours where
      there are some.

  Returns:
    The table.
  """
  os.makedirs(directory, exist_ok=True)
  path = os.path.join(directory, 'budget')
  best = exits.best_of(curves)
  _write_csv(names, curves, best, path + '.csv')
  table = _table(names, best, record)
  with open(path + '.md', 'w') as file:
    file.write(f'```\n{table}\n```\n')
  shown = [
    (f'early exit, {name}', [s.tested for s in curve])
    for name, curve in zip(names, curves, strict=True)
  ]
  if len(curves) > 1:
    shown.append(('best of these', [s.tested for _, s in best]))
  papers = [
    (f"{what}, the paper's", table[data_name])
    for what, table in (
      ('anytime', paper_curves.ANYTIME),
      ('early exit', paper_curves.BUDGETED),
    )
    if data_name in table
  ]
  figures.exit_curves(record, shown, papers, path)
  return table


def anytime_at(record: Record, gmacs: float) -> float:
  """Top-1 of the deepest exit within a cost: what one gets without exits."""
  within = [p.top1 for p in policies.fixed(record) if p.gmacs <= gmacs]
  return within[-1] if within else float('nan')


def _table(names, best, record: Record) -> str:
  anytime = [
    {
      'anytime': policy.name.removeprefix('fixed '),
      'MMACs': f'{1e3 * policy.gmacs:.1f}',
      'top-1 %': f'{100 * policy.top1:.2f}',
      'top-5 %': f'{100 * policy.top5:.2f}',
    }
    for policy in policies.fixed(record)
  ]
  budgeted = [
    {
      'early exit': names[i],
      'q': f'{s.ratio:.2f}',
      'MMACs planned': f'{1e3 * s.calibrated.gmacs:.1f}',
      'spent': f'{1e3 * s.tested.gmacs:.1f}',
      'top-1 %': f'{100 * s.tested.top1:.2f}',
      'anytime there': f'{100 * anytime_at(record, s.tested.gmacs):.2f}',
    }
    | {
      option: f'{100 * share:.0f} %'
      for option, share in zip(record.options, s.tested.shares, strict=False)
      if len(names) == 1
    }
    for i, s in best
  ]
  return f'{terminal.table(anytime)}\n\n{terminal.table(budgeted)}'


def _write_csv(names, curves, best, path: str) -> None:
  chosen = {id(s) for _, s in best}
  with open(path, 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(
      [
        'network',
        'q',
        'calibration_gmacs',
        'calibration_top1',
        'test_gmacs',
        'test_top1',
        'test_top5',
        'best',
        'shares',
        'thresholds',
      ]
    )
    for name, curve in zip(names, curves, strict=True):
      for s in curve:
        writer.writerow(
          [
            name,
            s.ratio,
            s.calibrated.gmacs,
            s.calibrated.top1,
            s.tested.gmacs,
            s.tested.top1,
            s.tested.top5,
            int(id(s) in chosen),
            ' '.join(f'{x:.4f}' for x in s.tested.shares),
            ' '.join(f'{x:.6f}' for x in s.thresholds),
          ]
        )
