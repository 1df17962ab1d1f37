# SPDX-License-Identifier: Apache-2.0
"""What chooses in a run, and what `calibrate` and the benchmark found of it."""

import csv
import dataclasses
import os

import numpy as np

from drnet_jax.report import compare, exits, policies
from drnet_jax.report.compare import Comparison
from drnet_jax.report.policies import Policy, Record
from drnet_jax.report.run import Run


def comparison(run: Run) -> Comparison | None:
  """The router of a run among its rivals; None if it has no router."""
  record = chosen(run)
  if record.log_p is None:
    return None
  if run.record.log_p is None:
    # Exits share their computation: running one after another is what they do.
    return compare.compare(record, name='early exit', cascade=False)
  return compare.compare(record)


def chosen(run: Run) -> Record:
  """The record of a run; of one with exits, with the exit of each image.

  Images leave by the thresholds that `calibrate` found best on held-out ones.
  """
  record = run.record
  limits = _exit_thresholds(os.path.join(run.directory, 'budget.csv'))
  if record.log_p is not None or limits is None:
    return record
  left_at = exits.leave_at(record.confidence, limits)
  with np.errstate(divide='ignore'):
    log_p = np.log(np.eye(len(limits))[left_at])
  return dataclasses.replace(record, log_p=log_p)


def _exit_thresholds(path: str) -> np.ndarray | None:
  """Of the setting that was best on the calibration images; None if none."""
  if not os.path.exists(path):
    return None
  with open(path, newline='') as file:
    rows = list(csv.DictReader(file))
  if not rows or 'thresholds' not in rows[0]:
    return None
  own = [row for row in rows if row['network'] == rows[0]['network']]
  best = max(
    own,
    key=lambda row: (
      float(row['calibration_top1']),
      -float(row['calibration_gmacs']),
    ),
  )
  return np.array([float(x) for x in best['thresholds'].split()])


def budget_curve(run: Run) -> list[Policy]:
  """What `calibrate` found that other budgets give; [] before it is run."""
  path = os.path.join(run.directory, 'budget.csv')
  if not os.path.exists(path):
    return []
  noun = run.record.noun
  name = 'early exit, all budgets' if noun == 'exit' else 'budget dial'
  with open(path, newline='') as file:
    points = [
      Policy(
        name,
        float(row['test_gmacs']),
        float(row['test_top1']),
        None,
        np.array([]),
      )
      for row in csv.DictReader(file)
      if row.get('best', '1') == '1'
    ]
  return sorted(points, key=lambda policy: policy.gmacs)


def latencies(run: Run) -> list[tuple[str, list[float], list[float]]]:
  """What `bench.inference` measured, one image at a time; [] if it did not.

  Returns:
    Name, milliseconds and top-1 in %: of the fixed sizes in each runtime, and
    of the router, which takes the predictor's time and that of the sizes in
    their shares.
  """
  path = os.path.join(run.directory, 'speed.csv')
  if not os.path.exists(path):
    return []
  with open(path, newline='') as file:
    rows = [row for row in csv.DictReader(file) if row.get('batch') == '1']
  ms = {
    (row['path'], row['part']): float(row['ms_per_image'])
    for row in rows
    if 'part' in row  # the benchmark of exits has other columns
  }
  record = run.record
  found = []
  for name in dict.fromkeys(path for path, _ in ms):
    if any((name, option) not in ms for option in record.options):
      continue
    sizes = [ms[name, option] for option in record.options]
    found.append((f'{name}, fixed', sizes, list(100 * record.top1.mean(0))))
    if record.log_p is not None and (name, 'predictor') in ms:
      router = policies.routed(record)
      total = ms[name, 'predictor'] + float(router.shares @ sizes)
      found.append((f'{name}, routed', [total], [100 * router.top1]))
  return found
