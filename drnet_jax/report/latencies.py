# SPDX-License-Identifier: Apache-2.0
"""What `benchmark` measured of a run, for its report."""

import csv
import os

from drnet_jax.choosing import scores
from drnet_jax.report.evaluated import EvaluatedRun


def of(run: EvaluatedRun) -> list[tuple[str, list[float], list[float]]]:
  """What `benchmark` measured, one image at a time; [] if it did not.

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
    if any((name, option) not in ms for option in record.options.names):
      continue
    sizes = [ms[name, option] for option in record.options.names]
    found.append((f'{name}, fixed', sizes, list(100 * record.top1.mean(0))))
    if run.router and (name, 'predictor') in ms:
      router = scores.score(run.router, record, 'router')
      total = ms[name, 'predictor'] + float(router.shares @ sizes)
      found.append((f'{name}, routed', [total], [100 * router.top1]))
  return found
