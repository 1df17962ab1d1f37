# SPDX-License-Identifier: Apache-2.0
"""Budgeted batch classification by the rule of RANet's paper.

The ratio of the shares that leave at consecutive exits is swept; thresholds are
set on held-out images and scored on the test images (`choosing.exit_shares`).
"""

import dataclasses
import os
from collections.abc import Sequence

from drnet_jax import terminal
from drnet_jax.choosing import calibration, exit_shares, scores
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.record import Record
from drnet_jax.choosing.scores import Score
from drnet_jax.errors import UserError
from drnet_jax.report import evaluated, figures, paper_curves
from drnet_jax.run import ladder
from drnet_jax.tables import write_csv


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
  """Thresholds, and what they give on two sets of images.

  Attributes:
    network: its name.
    ratio: share of images that leave at an exit over that of the exit before.
    policy: with these thresholds.
    calibrated: on the images that the thresholds were set on.
    tested: on others.
  """

  network: str
  ratio: float
  policy: Policy
  calibrated: Score
  tested: Score


def sweep(network: str, held_out: Record, test: Record) -> list[Setting]:
  """The curve of a network; `held_out` are all that thresholds know."""
  found = []
  for ratio in exit_shares.RATIOS:
    policy = exit_shares.by_ratio(held_out, ratio)
    ours, theirs = (scores.score(policy, r, network) for r in (held_out, test))
    found.append(Setting(network, ratio, policy, ours, theirs))
  return found


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
  curves = []
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
    curves.append(sweep(name, held_out, run.record))
  record, path = runs[0].record, os.path.join(directory, 'budget')
  every = [setting for curve in curves for setting in curve]
  best = best_of(every)
  write_csv(path + '.csv', [_row(s, s in best) for s in every])
  table = _table(best, record)
  with open(path + '.md', 'w', encoding='utf-8') as file:
    file.write(f'```\n{table}\n```\n')
  shown = [
    (f'early exit, {curve[0].network}', [s.tested for s in curve])
    for curve in curves
  ]
  if len(curves) > 1:
    shown.append(('best of these', [s.tested for s in best]))
  data = runs[0].config.data.name
  papers = [
    (f"{what}, the paper's", known[data])
    for what, known in (
      ('anytime', paper_curves.ANYTIME),
      ('early exit', paper_curves.BUDGETED),
    )
    if data in known
  ]
  figures.exit_curves(record, shown, papers, path)
  return table


def anytime_at(record: Record, gmacs: float) -> float:
  """Top-1 of the deepest exit within a cost: with all images at one exit."""
  most = gmacs * (1 + 1e-9)
  within = [s.top1 for s in scores.fixed_scores(record) if s.gmacs <= most]
  return within[-1] if within else float('nan')


def _table(best: Sequence[Setting], record: Record) -> str:
  anytime = [
    {
      'anytime': score.name.removeprefix('fixed '),
      'MMACs': f'{1e3 * score.gmacs:.1f}',
      'top-1 %': f'{100 * score.top1:.2f}',
      'top-5 %': f'{100 * score.top5:.2f}',
    }
    for score in scores.fixed_scores(record)
  ]
  alone = len({s.network for s in best}) == 1
  budgeted = [
    {
      'early exit': s.network,
      'q': f'{s.ratio:.2f}',
      'MMACs planned': f'{1e3 * s.calibrated.gmacs:.1f}',
      'spent': f'{1e3 * s.tested.gmacs:.1f}',
      'top-1 %': f'{100 * s.tested.top1:.2f}',
      'anytime there': f'{100 * anytime_at(record, s.tested.gmacs):.2f}',
    }
    | {
      f'exit {k}': f'{100 * share:.0f} %'
      for k, share in enumerate(s.tested.shares, 1)
      if alone
    }
    for s in best
  ]
  return f'{terminal.table(anytime)}\n\n{terminal.table(budgeted)}'


def _row(s: Setting, is_best: bool) -> dict[str, object]:
  return {
    'network': s.network,
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
