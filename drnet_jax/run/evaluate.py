# SPDX-License-Identifier: Apache-2.0
"""Evaluation: what the latest weights score, what policies make of them."""

import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from PIL import Image

from drnet_jax import processes, terminal
from drnet_jax.choosing import scores
from drnet_jax.choosing.options import Costs
from drnet_jax.choosing.record import Record
from drnet_jax.errors import NotHeldOut, UserError
from drnet_jax.report import evaluated, pictures, run_page
from drnet_jax.report.page import FILE
from drnet_jax.run.calibrate import Calibrated, calibrate
from drnet_jax.run.recording import Subject
from drnet_jax.run.workdir import Trained

_EXAMPLES = 8  # images to try `predict` on


def evaluate(
  path: str,
  overrides: Sequence[str] = (),
  measure: Callable[[Trained], Costs | None] = lambda _: None,
) -> Record:
  """Evaluates the latest weights of a workdir on its test split.

  Prints a table and leaves in `<workdir>/report/`: `record.npz` (what every
  image got at every option), the report made of it (see `report.run_page`;
  `python -m drnet_jax report` makes it again), and a few images to try
  `predict` on as `examples/*.png`. Where the validation split holds other
  images than the test split, policies are calibrated on it (see `calibrate`).

  `overrides` ('--config.data.<field>=<value>') are for data that has moved;
  `measure` says what each option takes in milliseconds, if it is to be timed.

  Raises:
    UserError: the workdir holds no trained model, or the data does not fit it.
  """
  subject = Subject(path, overrides)
  record = subject.record(subject.data.test_split, 'evaluate')
  calibrated, ms, refusal = None, None, ''
  try:
    ms = measure(subject.trained)
  except UserError as error:  # such as a runtime that is not installed
    terminal.say(f'Not measured: {error}')
  try:
    calibrated = calibrate(subject, record, ms=ms)
  except UserError as error:
    # What a process cannot read the others know nothing of: they would wait.
    if jax.process_count() > 1 and not isinstance(error, NotHeldOut):
      raise
    refusal = f'Not calibrated: {error}'
  if processes.is_main():
    _say(subject, record, calibrated, refusal)
    _write(subject, record, calibrated)
  processes.wait_for_all('report')
  return record


def _say(
  subject: Subject,
  record: Record,
  calibrated: Calibrated | None,
  refusal: str,
) -> None:
  """Prints what was found; called before `_write`, which a disk may stop."""
  data, bad = subject.data, subject.unreadable(record)
  found = evaluated.calibration(subject.path, record)  # of another split
  if calibrated:
    found = calibrated.calibration
  elif found:
    refusal = refusal.replace('Not calibrated', 'Not calibrated again')
  run = evaluated.EvaluatedRun(subject.path, record, found)
  terminal.say(
    f'\n{data.name}/{data.test_split}, {len(record.label)} images'
    + (f'; {bad} more cannot be read and are left out' if bad else '')
    + (
      '; it was trained on these'
      if subject.learnt_from(data.test_split)
      else ''
    )
  )
  terminal.say(summary(run))
  for answer in run_page.answers(run):
    terminal.say(f'{answer.question} {answer.short}. {answer.text}')
  if refusal:
    terminal.say(refusal)


def _write(
  subject: Subject, record: Record, calibrated: Calibrated | None
) -> None:
  """Leaves what `evaluate` promises."""
  path, trained, data = subject.path, subject.trained, subject.data
  directory = os.path.join(path, 'report')
  subject.keep(record)
  if calibrated:
    calibrated.write()
  source = subject.source(data.test_split)

  def read_image(i: int) -> np.ndarray:
    # Images that cannot be read are in the split and not in the record.
    encoded = source.examples[record.extra['index'][i]]['image']
    return data.eval_image(encoded, trained.model.image_px)

  run = evaluated.read(path)
  pictures.save(record, run.ends(), read_image, directory)
  examples = os.path.join(directory, 'examples')
  os.makedirs(examples, exist_ok=True)
  for i in range(min(_EXAMPLES, len(record.label))):
    name = f'{i}_{trained.class_names[record.label[i]]}.png'.replace('/', '_')
    Image.fromarray(read_image(i)).save(os.path.join(examples, name))
  run_page.write(evaluated.read(path), directory)  # now with pictures
  terminal.say(f'Report: {os.path.join(directory, FILE)}')


def summary(run: evaluated.EvaluatedRun) -> str:
  """The table of an evaluation as text."""
  record, rows = run.record, []
  names = record.options.names
  for score in run.scores():
    row = {
      'policy': score.name,
      'top-1 %': f'{100 * score.top1:.2f}',
      'top-5 %': '' if score.top5 is None else f'{100 * score.top5:.2f}',
      'GMACs': f'{score.gmacs:.4g}',
      'cost %': f'{100 * score.gmacs / record.costs.full:.1f}',
    }
    for name, share in zip(names, score.shares, strict=True):
      row[name] = '' if np.isnan(share) else f'{100 * share:.1f} %'
    rows.append(row)
  needed = scores.smallest_sufficient(record)
  counts = np.bincount(needed, minlength=len(names) + 1)
  lines = [
    terminal.table(rows),
    'Cheapest correct option: '
    + ', '.join(
      f'{100 * count / len(needed):.1f} % {name}'
      for name, count in zip([*names, 'none'], counts, strict=True)
    )
    + '.',
  ]
  lines += [
    f'Rank correlation of {name} and where images end: {rho:+.2f}.'
    for name, rho in run.rank_correlations().items()
  ]
  return '\n'.join(lines)
