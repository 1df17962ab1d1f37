# SPDX-License-Identifier: Apache-2.0
"""Finds the best policy for every budget, on images held out from training.

    python -m drnet_jax calibrate --workdir=runs/quickstart [--measure=onnx]
    python -m drnet_jax calibrate --workdir=runs/small,runs/large --to=runs/both

`main` ends with it. By itself it serves another split (`--split`), another
machine (`--measure` times each option here, in that runtime and `--precision`,
`--batch` images at once; what is followed without a budget is then the cheapest
in time), or a ladder: several runs of the same classes, the cheapest network
first, which get a folder of their own (`--to`).

Runs the model over the validation split and searches fixed options, the router,
cascades and routed cascades; leaves `calibration.json`. Then checks what it
promises on the test split, beside the best fixed options, and writes the report
again. Policies are never set on the images that they are tested on.

`--halves=10` needs no images but those of the test split: policies are set on
one half and scored on the other, each half in its turn, so many times, for many
budgets and, without one, such as keep the accuracy. It prints means, leaves
`halves.csv` (in `--to`, else in the report), and no policy to use.

Of a network with exits it also draws the curve of budgeted batch classification
by the rule of the paper, `report/budget.*`; with `--compare=other,workdirs` the
best of several networks at each budget.
"""

import functools
import os
from collections.abc import Sequence

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.commands import flags as shared
from drnet_jax.errors import UserError

USES = ('to', *shared.TIMING)
_SPLIT = flags.DEFINE_string(
  'split', None, 'Held-out images; default config.data.validation_split.'
)
_HALVES = flags.DEFINE_integer(
  'halves', 0, 'Times to divide the test images in two instead.', 0
)
_COMPARE = flags.DEFINE_list(
  'compare', [], 'Calibrated networks with exits to draw beside this one.'
)

parse_flags = cli.keep_overrides


def run(arguments: Sequence[str]) -> None:
  from drnet_jax import processes, terminal
  from drnet_jax.models.ranet import RANet
  from drnet_jax.report import evaluated, exit_tables, run_page
  from drnet_jax.run import calibrate, ladder
  from drnet_jax.run.recording import Subject
  from drnet_jax.serve.classifier import Classifier

  path, to = cli.model(), shared.TO.value
  if isinstance(path, str) and ladder.is_ladder(path):
    path, to = list(ladder.members(path).values()), to or path
  if _HALVES.value:
    how = shared.MEASURE, shared.PRECISION, shared.BATCH
    cli.refuse_beside('--halves', *how, _SPLIT, _COMPARE)
    _halves([path] if isinstance(path, str) else path, to, arguments)
    return
  shared.check_timing()
  if isinstance(path, str):
    cli.refuse_beside('one --workdir, but for --halves', shared.TO)
    subject = Subject(path, arguments)
    if not isinstance(subject.trained.model, RANet):
      cli.refuse_beside('a network without exits', _COMPARE)
    # In memory: beside the run may lie a calibration that cannot be read.
    ms = shared.measured(functools.partial(Classifier.of, subject.trained))
    done = calibrate.calibrate(subject, split=_SPLIT.value, ms=ms)
  else:
    cli.refuse_beside('a ladder', _COMPARE)
    if not to:
      raise UserError('--to is missing: name a folder for the ladder')
    ms = shared.measured(functools.partial(Classifier.load, path))
    how = {'split': _SPLIT.value, 'ms': ms}
    done = calibrate.calibrate_ladder(path, to, arguments, **how)
  found = evaluated.EvaluatedRun(done.folder, done.test, done.calibration)
  terminal.say(run_page.budget_table(found))
  for answer in run_page.answers(found):
    terminal.say(f'{answer.question} {answer.short}. {answer.text}')
  if not processes.is_main():
    return
  done.write()
  run_page.write(found, found.directory)
  if found.record.options.noun == 'exit':
    paths = [done.folder, *_COMPARE.value]
    terminal.say(exit_tables.write(paths, found.directory))
  written = os.path.join(done.folder, 'calibration.json')
  terminal.say(f'Written: {written}, {found.directory}')


def _halves(paths: list[str], to: str | None, overrides: Sequence[str]) -> None:
  """Estimates what policies give, without images to set them on."""
  import numpy as np

  from drnet_jax import terminal
  from drnet_jax.choosing import halves
  from drnet_jax.run import calibrate, ladder
  from drnet_jax.run.recording import Subject
  from drnet_jax.tables import write_csv

  names = zip(ladder.short_names(paths), paths, strict=True)
  subjects = {name: Subject(path, overrides) for name, path in names}
  first = next(iter(subjects.values()))
  if len(subjects) > 1:
    record = calibrate.joined_record(subjects, first.data.test_split)
  else:
    record = first.test_record()
  if len(record.options) < 2:
    raise UserError('there is only one option: nothing can choose')
  budgets = np.geomspace(record.gmacs.min(), record.costs.full, 16)
  rows = halves.halves(record, budgets[1:], splits=_HALVES.value)
  shown = [
    {
      'policy': row['family'],
      'budget': 'none'
      if row['budget'] == halves.NO_BUDGET
      else f'{row["budget"]:.4g}',
      'GMACs': f'{row["gmacs"]:.4g}',
      'top-1 %': f'{100 * row["top1"]:.2f}',
      'best fixed there': f'{100 * row["best_fixed"]:.2f}',
      'gain': f'{100 * row["gain"]:+.2f} [{100 * row["gain_least"]:+.2f}, '
      f'{100 * row["gain_most"]:+.2f}]',
      'full option': f'{100 * row["largest"]:.2f}',
      'as accurate': f'{row["kept"]:.0%} of halves',
    }
    for row in halves.summary(rows)
  ]
  print(terminal.table(shown))
  folder = to or os.path.join(paths[0], 'report')
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, 'halves.csv')
  write_csv(path, rows)
  print(f'Written: {path}')
