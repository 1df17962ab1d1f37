# SPDX-License-Identifier: Apache-2.0
"""Accuracy over the milliseconds that `benchmark` measured."""

import csv
import os
from collections.abc import Mapping

import numpy as np

from drnet_jax.choosing import scores
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.record import Record
from drnet_jax.report.evaluated import EvaluatedRun
from drnet_jax.report.plots import Curve

_STAR = {'marker': '*', 'ms': 12, 'ls': ''}


def of(run: EvaluatedRun) -> list[Curve]:
  """What `benchmark` left with the report of a run; [] if it did not."""
  path = os.path.join(run.directory, 'speed.csv')
  if not os.path.exists(path):
    return []
  with open(path, newline='') as file:
    ms = {
      (row['path'], row['part']): float(row['ms_per_image'])
      for row in csv.DictReader(file)
      # Version 0.4 had other columns for exits.
      if row.get('batch') == '1' and 'part' in row
    }
  return curves(ms, run.record, run.router)


def curves(
  ms: Mapping[tuple[str, str], float], record: Record, router: Policy | None
) -> list[Curve]:
  """Accuracy over the time of an image, one at a time.

  Args:
    ms: by runtime and part, an option or 'predictor'.
    record: of the test split.
    router: the predictor as it was trained; None where there is none.

  Returns:
    Top-1 in % over milliseconds: of the fixed options in each runtime, and of
    the router, which takes the predictor's time and that of the options in
    their shares.
  """
  names = record.options.names
  found = []
  for runtime in dict.fromkeys(runtime for runtime, _ in ms):
    if any((runtime, name) not in ms for name in names):
      continue
    options = np.array([ms[runtime, name] for name in names])
    if record.options.noun == 'exit':
      options = np.cumsum(options)  # each was timed from the one before
    fixed = 100 * record.top1.mean(0)
    found.append(Curve(f'{runtime}, fixed', options, fixed))
    if router and (runtime, 'predictor') in ms:
      routed = scores.score(router, record, 'router')
      total = ms[runtime, 'predictor'] + float(routed.shares @ options)
      top1 = [100 * routed.top1]
      found.append(Curve(f'{runtime}, routed', [total], top1, _STAR))
  return found
