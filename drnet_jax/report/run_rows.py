# SPDX-License-Identifier: Apache-2.0
"""The csv files that a report leaves, and the rows of those of a run."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from drnet_jax.choosing import scores
from drnet_jax.choosing.policy import describe
from drnet_jax.choosing.scores import ClassEffect, Interval
from drnet_jax.report.evaluated import EvaluatedRun
from drnet_jax.tables import write_csv


def write(
  tables: Mapping[str, Sequence[Mapping[str, Any]] | None], directory: str
) -> None:
  """Writes rows by the name of their file; without any an old one goes."""
  for name, rows in tables.items():
    path = os.path.join(directory, f'{name}.csv')
    if rows:
      write_csv(path, rows)
    elif os.path.exists(path):
      os.remove(path)  # of other weights


def policies(run: EvaluatedRun) -> list[dict[str, Any]]:
  """What `evaluation.csv` holds."""
  rows = []
  for s in run.judgement.all if run.judgement else run.fixed:
    row = {'policy': s.name}
    for name in ('gmacs', 'top1', 'gain'):
      row |= columns(name, getattr(s, name))
    row['top5'] = s.top5
    for option, share in zip(run.record.options.names, s.shares, strict=True):
      row[f'share of {option}'] = share
    rows.append(row)
  return rows


def budgets(run: EvaluatedRun) -> list[dict[str, Any]]:
  """What `budgets.csv` holds."""
  return [
    {
      'family': family,
      'budget_gmacs': budget,
      'promised_gmacs': point.gmacs,
      'promised_top1': point.top1,
      'test_gmacs': got.gmacs,
      'test_top1': got.top1,
      'test_top5': got.top5,
      'best_fixed': scores.hull_top1(run.record, got.gmacs),
      'policy': describe(point.policy, run.record.options),
    }
    for family, checked in run.budgets.items()
    for budget, point, got in checked
  ]


def classes(effects: Sequence[ClassEffect]) -> list[dict[str, Any]]:
  """What `classes.csv` holds."""
  return [
    {'class': e.name, 'images': e.images, 'full_top1': e.full}
    | columns('change', e.change)
    | {'gmacs': e.gmacs}
    for e in effects
  ]


def columns(name: str, around: Interval | None) -> dict[str, float | str]:
  """A number and its interval as cells; '' where there is none."""
  ends = {'': 'value', '_low': 'low', '_high': 'high'}
  return {
    name + end: getattr(around, field) if around else ''
    for end, field in ends.items()
  }
