# SPDX-License-Identifier: Apache-2.0
"""Budgeted batch classification by the rule of RANet's paper.

The ratio of the shares that leave at consecutive exits is swept; thresholds are
set on held-out images and scored on the test images (`choosing.exit_shares`).
"""

import collections
import csv
import dataclasses
import importlib.resources
import os
from collections.abc import Sequence

from drnet_jax import terminal
from drnet_jax.choosing import calibration, exit_shares, scores
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.scores import Score
from drnet_jax.errors import UserError
from drnet_jax.report import evaluated, plots
from drnet_jax.report.plots import Curve
from drnet_jax.run import ladder
from drnet_jax.tables import write_csv


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
  """Thresholds, and what they give on two sets of images.

  Attributes:
    ratio: share of images that leave at an exit over that of the exit before.
    policy: with these thresholds.
    calibrated: score on the images that the thresholds were set on, under the
      name of the network.
    tested: on others.
  """

  ratio: float
  policy: Policy
  calibrated: Score
  tested: Score


def best_of(settings: Sequence[Setting]) -> list[Setting]:
  """The best of several networks at each budget, ascending in cost.

  Which is best is read off the calibration images; what it scores, off others.
  """
  found: list[Setting] = []
  for setting in sorted(
    settings, key=lambda s: (s.calibrated.gmacs, -s.calibrated.top1)
  ):
    if not found or setting.calibrated.top1 > found[-1].calibrated.top1:
      found.append(setting)
  return found


def write(paths: Sequence[str], directory: str) -> str:
  """Leaves `budget.csv`, `budget.md` and the figure `budget` in a folder.

  Args:
    paths: workdirs of calibrated networks with exits.
    directory: of the report of the first.

  Returns:
    The table.
  """
  runs = [evaluated.read(path) for path in paths]
  curves = {}
  for run, name in zip(runs, ladder.short_names(paths), strict=True):
    if not run.record.is_of_images_of(runs[0].record):
      raise UserError(
        f'{runs[0].path} and {run.path} were tested on different images'
      )
    held_out = calibration.read_record(run.path)
    if held_out is None or held_out.options.noun != 'exit':
      raise UserError(
        f'{run.path} is not a calibrated network with exits: python -m '
        f'drnet_jax calibrate --workdir={run.path}'
      )
    curves[f'early exit, {name}'] = curve = []
    for ratio in exit_shares.RATIOS:
      policy = exit_shares.by_ratio(held_out, ratio)
      both = (scores.score(policy, r, name) for r in (held_out, run.record))
      curve.append(Setting(ratio, policy, *both))
  every = [setting for curve in curves.values() for setting in curve]
  best = best_of(every)
  if len(curves) > 1:
    curves['best of these'] = best
  path = os.path.join(directory, 'budget')
  write_csv(path + '.csv', [_row(s, s in best) for s in every])
  anytime = scores.fixed_scores(runs[0].record)
  table = _table(best, anytime)
  with open(path + '.md', 'w', encoding='utf-8') as file:
    file.write(f'```\n{table}\n```\n')
  look = {'lw': 1, 'marker': 'o', 'drawstyle': 'steps-post'}
  shown = [Curve.of('anytime: all images at one exit', anytime, 1e3, **look)]
  for name, settings in curves.items():
    tested = sorted((s.tested for s in settings), key=lambda s: s.gmacs)
    shown.append(Curve.of(name, tested, 1e3, lw=1, marker='.'))
  shown += _papers(runs[0].config.data.name)
  plots.write({'average cost of an image, MMACs': shown}, path)
  return table


def _papers(data: str) -> list[Curve]:
  """The curves of RANet's paper (arXiv:2003.07326) for a data set.

  Of each exit of the anytime models, and the upper envelope of the budgeted
  ones. Read off the figures by the pixel: about .05 points and .3 % of the
  cost. They are the paper's results, not ours.
  """
  points = collections.defaultdict(list)
  file = importlib.resources.files('drnet_jax.report') / 'paper_curves.csv'
  for row in csv.DictReader(file.read_text().splitlines()):
    if row['data'] == data:
      points[row['curve']].append((float(row['mmacs']), float(row['top1'])))
  look = {'color': '#999999', 'ls': '--', 'marker': 'x'}
  return [
    Curve(f"{name}, the paper's", *zip(*found, strict=True), look)
    for name, found in points.items()
  ]


def _table(best: Sequence[Setting], anytime: Sequence[Score]) -> str:
  at_one_exit = [
    {
      'anytime': score.name.removeprefix('fixed '),
      'MMACs': f'{1e3 * score.gmacs:.1f}',
      'top-1 %': f'{100 * score.top1:.2f}',
      'top-5 %': f'{100 * score.top5:.2f}',
    }
    for score in anytime
  ]
  alone = len({s.tested.name for s in best}) == 1
  budgeted = []
  for s in best:
    # None if a network beside the first is cheaper than its first exit.
    there = [x for x in anytime if x.gmacs <= s.tested.gmacs * (1 + 1e-9)]
    row = {
      'early exit': s.tested.name,
      'q': f'{s.ratio:.2f}',
      'MMACs planned': f'{1e3 * s.calibrated.gmacs:.1f}',
      'spent': f'{1e3 * s.tested.gmacs:.1f}',
      'top-1 %': f'{100 * s.tested.top1:.2f}',
      'anytime there': f'{100 * there[-1].top1:.2f}' if there else 'nan',
    }
    for k, share in enumerate(s.tested.shares if alone else (), 1):
      row[f'exit {k}'] = f'{100 * share:.0f} %'
    budgeted.append(row)
  return f'{terminal.table(at_one_exit)}\n\n{terminal.table(budgeted)}'


def _row(s: Setting, is_best: bool) -> dict[str, object]:
  return {
    'network': s.tested.name,
    'q': s.ratio,
    'calibration_gmacs': s.calibrated.gmacs,
    'calibration_top1': s.calibrated.top1,
    'test_gmacs': s.tested.gmacs,
    'test_top1': s.tested.top1,
    'test_top5': s.tested.top5,
    'best': int(is_best),
    'shares': ' '.join(f'{x:.4f}' for x in s.tested.shares),
    # Whole, so that they can be used again.
    'thresholds': ' '.join(map(repr, s.policy.stop)),
  }
