# SPDX-License-Identifier: Apache-2.0
"""Command line: calibrates the budget dial of a trained model.

    python -m drnet_jax calibrate --workdir=runs/quickstart [--measure=jax]

Runs the model over the validation split and leaves `calibration.json` in the
workdir; from then on `predict --budget_gmacs=...` and `Classifier.set_budget`
work. `--measure` also times each size on this machine, in that runtime, for
budgets in milliseconds. Then checks the dial on the test split: budgets asked
for, what they cost and score there, beside the best fixed size, a random choice
and the confidence cascade at the same cost. `--compare=other,workdirs` adds the
routed points of other runs (an alpha sweep) to the figure.

Of a network with exits it stores what sets their thresholds, and reports the
whole curve of budgeted batch classification on the test split; with `--compare`
the best of several networks at each budget.
"""

import csv
import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from absl import flags

from drnet_jax import mesh as mesh_lib
from drnet_jax import settings, terminal
from drnet_jax.bench import costs
from drnet_jax.commands import cli
from drnet_jax.data.pipeline import HELD_OUT, Data
from drnet_jax.errors import UserError
from drnet_jax.models.ranet import RANet
from drnet_jax.report import exit_tables, exits, figures, policies
from drnet_jax.report.policies import Policy, Record
from drnet_jax.run import workdir
from drnet_jax.run.evaluate import record_split, test_record
from drnet_jax.serve import budget, exit_budget
from drnet_jax.serve.classifier import RUNTIMES, Classifier
from drnet_jax.serve.early_exit import EarlyExitClassifier
from drnet_jax.serve.exit_budget import ExitCalibration

_MEASURE = flags.DEFINE_enum(
  'measure', None, RUNTIMES, 'Time each size, too, in this runtime.'
)
_BATCH = flags.DEFINE_integer('batch', 1, 'Images at once when timing.', 1)
_POINTS = flags.DEFINE_integer('points', 12, 'Budgets to check.', 2)
_COMPARE = flags.DEFINE_list('compare', [], 'Evaluated workdirs to compare.')


@dataclasses.dataclass(frozen=True)
class Check:
  """A budget asked for, and what it gave on images it was not set on.

  Attributes:
    asked: GMACs.
    promised: top-1 on the calibration images.
    got: cost and score on the test images.
  """

  asked: float
  promised: float
  got: Policy


def calibrate(path: str) -> budget.Calibration | ExitCalibration:
  """Runs the validation split and writes `calibration.json`.

  Args:
    path: workdir of a run with a trained predictor, or with exits.

  Returns:
    The calibration; milliseconds measured earlier are kept.

  Raises:
    UserError: no trained predictor, or no images but those of the test.
  """
  mesh = mesh_lib.create()
  trained = workdir.load(path, mesh)
  has_exits = isinstance(trained.model, RANet)
  if not (has_exits or trained.has_router):
    raise UserError(f'{path}: its predictor is not trained yet')
  data = settings.call(Data, trained.config.data, 'config.data')
  if has_exits and data.validation_split == data.test_split:
    raise UserError(
      f'{path}: thresholds would be set on the images they are to be tested '
      'on. Train with --config.data.held_out=5000 '
      f'--config.data.validation_split={HELD_OUT}'
    )
  before = exit_budget.read(path)
  make = ExitCalibration if has_exits else budget.Calibration
  record = record_split(
    trained, mesh, data, data.open(data.validation_split), 'calibrate'
  )
  calibration = make.of(record, split=f'{data.name}/{data.validation_split}')
  calibration.ms = before and before.ms
  calibration.write(path)
  return calibration


def check(
  calibration: budget.Calibration, record: Record, count: int
) -> list[Check]:
  """Asks for budgets and sees what they cost on other images.

  Args:
    calibration: sets the dial.
    record: of images that it has not seen.
    count: budgets, spread evenly between the cheapest size and the dearest.
  """
  return [
    Check(point.cost, point.top1, calibration.score(point, record))
    for point in calibration.points(calibration.gmacs, count)
  ]


def run(arguments: Sequence[str]) -> None:
  path = cli.workdir()
  calibration = calibrate(path)
  if _MEASURE.value:
    classifier = Classifier.load(
      path, runtime=_MEASURE.value, batch=_BATCH.value
    )
    if isinstance(classifier, EarlyExitClassifier):
      calibration.ms = costs.measure_stages(
        classifier.engine, batch=_BATCH.value
      )
    else:
      calibration.ms = costs.measure(
        classifier.contract, classifier.engine, batch=_BATCH.value
      )
    calibration.write(path)
    print(_cost_table(calibration))
  if isinstance(calibration, ExitCalibration):
    _report_exits(path, calibration)
    return
  record = test_record(path)
  checks = check(calibration, record, _POINTS.value)
  print(_report(checks, record))
  others = [
    [policies.random_choice(record, c.got.gmacs) for c in checks],
    policies.cascade_curve(record),
  ]
  sweep = []
  for other in _COMPARE.value:
    compared = test_record(other)
    if compared.log_p is None:
      raise UserError(f'--compare: {other} has no trained predictor')
    sweep.append(policies.routed(compared))
  if sweep:
    sweep.append(policies.routed(record))
    named = [dataclasses.replace(p, name='alpha sweep') for p in sweep]
    others.append(sorted(named, key=lambda policy: policy.gmacs))
  directory = os.path.join(path, 'report')
  os.makedirs(directory, exist_ok=True)
  figure = os.path.join(directory, 'budget')
  figures.budget_curve(record, [c.got for c in checks], others, figure)
  _write_csv(checks, record, figure + '.csv')
  print(f'Written: {os.path.join(path, budget.FILE)}, {figure}.csv, .png, .svg')


def _report_exits(path: str, calibration: ExitCalibration) -> None:
  """Prints and writes the curve of a network with exits, or of several."""
  record = test_record(path)
  paths = [path, *_COMPARE.value]
  curves = [exits.sweep(calibration.confidence, calibration.correct, record)]
  for other in _COMPARE.value:
    found = exit_budget.read(other)
    if not isinstance(found, ExitCalibration):
      raise UserError(
        f'--compare: {other} holds no calibrated network with exits: python '
        f'-m drnet_jax calibrate --workdir={other}'
      )
    curves.append(
      exits.sweep(found.confidence, found.correct, test_record(other))
    )
  names = [os.path.basename(os.path.normpath(p)) for p in paths]
  data = workdir.read_config(path).data
  directory = os.path.join(path, 'report')
  print(exit_tables.write(directory, names, curves, record, data.name))
  print(
    f'Written: {os.path.join(path, budget.FILE)}, '
    f'{os.path.join(directory, "budget")}.csv, .md, .png, .svg'
  )


def _cost_table(calibration: budget.Calibration) -> str:
  gmacs, ms = calibration.gmacs, calibration.ms
  rows = [
    {'size': f'{i}', 'GMACs': f'{a:.4g}', 'ms': f'{b:.4g}'}
    for i, a, b in zip(
      [*range(1, len(ms.sizes) + 1), 'predictor'],
      (*gmacs.sizes, gmacs.predictor),
      (*ms.sizes, ms.predictor),
      strict=True,
    )
  ]
  return f'{terminal.table(rows)}\n({ms.source})\n'


def _report(checks: Sequence[Check], record: Record) -> str:
  curve = policies.cascade_curve(record)
  rows = [
    {
      'asked GMACs': f'{c.asked:.4g}',
      'got': f'{c.got.gmacs:.4g}',
      'off %': f'{100 * (c.got.gmacs / c.asked - 1):+.1f}',
      'top-1 %': _percent(c.got.top1),
    }
    | {
      name: '' if np.isnan(top1) else _percent(top1)
      for name, top1 in _rivals(curve, record, c.got.gmacs).items()
    }
    for c in checks
  ]
  near = sum(abs(c.got.gmacs / c.asked - 1) <= 0.03 for c in checks)
  return (
    f'{terminal.table(rows)}\n{near} of {len(checks)} budgets land within '
    f'3 % on {len(record.label)} test images.'
  )


def _percent(share: float) -> str:
  return f'{100 * share:.2f}'


def _write_csv(checks: Sequence[Check], record: Record, path: str) -> None:
  """The table as it is, and what rivals score at the same cost."""
  curve = policies.cascade_curve(record)
  with open(path, 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(
      ['asked_gmacs', 'promised_top1', 'test_gmacs', 'test_top1', 'test_top5']
      + ['best_fixed', 'random', 'cascade']
    )
    for c in checks:
      writer.writerow(
        [c.asked, c.promised, c.got.gmacs, c.got.top1, c.got.top5]
        + list(_rivals(curve, record, c.got.gmacs).values())
      )


def _rivals(
  curve: Sequence[Policy], record: Record, gmacs: float
) -> dict[str, float]:
  """Top-1 at this cost; NaN where the cascade cannot cost so little."""
  costs, top1 = ([getattr(p, f) for p in curve] for f in ('gmacs', 'top1'))
  return {
    'best fixed': policies.best_fixed(record, gmacs).top1,
    'random': policies.random_choice(record, gmacs).top1,
    'cascade': float(np.interp(gmacs, costs, top1, left=np.nan, right=np.nan)),
  }
