# SPDX-License-Identifier: Apache-2.0
"""Policies for every budget, found on held-out images; see `choosing`."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from drnet_jax import processes
from drnet_jax.choosing import calibration as calibration_lib
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.options import Costs
from drnet_jax.choosing.record import Record
from drnet_jax.data.pipeline import HELD_OUT, TESTED
from drnet_jax.errors import NotHeldOut, UserError
from drnet_jax.run import ladder, workdir
from drnet_jax.run.recording import Subject

_ALIKE = 0.01  # share of two splits' images that may be alike by chance


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """What was found, before any of it is written.

  Attributes:
    folder: the workdir, or the folder of a ladder.
    test: record of the images that the report is made of.
    held_out: record of the images that policies were found on.
    calibration: the policies.
    subject: of a workdir, the run.
  """

  folder: str
  test: Record
  held_out: Record
  calibration: Calibration
  subject: Subject | None = None

  def write(self) -> None:
    """Leaves the calibration and the records of both splits in the folder."""
    path = os.path.join(self.folder, workdir.TEST_RECORD)
    try:
      before = record_lib.load(path).origin
    except (OSError, UserError):  # none yet, or a damaged one
      before = None
    if before != self.test.origin:
      os.makedirs(os.path.dirname(path), exist_ok=True)
      if self.subject:
        self.subject.keep(self.test)
      else:
        record_lib.save(self.test, path)
    self.calibration.write(self.folder)
    calibration_lib.write_record(self.folder, self.held_out)


def calibrate(
  subject: Subject,
  test: Record | None = None,
  *,
  split: str | None = None,
  ms: Costs | None = None,
) -> Calibrated:
  """Finds the best policies on held-out images.

  Args:
    subject: the run.
    test: record of the images that the report is made of; None for what
      `evaluate` recorded.
    split: of the held-out images; default the validation split.
    ms: milliseconds of this machine; default those measured before.

  Raises:
    NotHeldOut: the split is the one that was trained on, or holds images of
      the test split.
  """
  split = split or subject.data.validation_split
  check_held_out(split, subject)
  test = subject.test_record() if test is None else test
  try:
    record = calibration_lib.read_record(subject.path)
  except UserError:  # damaged: made anew
    record = None
  if not subject.is_current(record, split):
    record = subject.record(split, 'calibrate')
  _check_disjoint(record, test, split)
  shown = f'{subject.data.name}/{split}'
  done = _calibrated(subject.path, test, record, shown, ms)
  return dataclasses.replace(done, subject=subject)


def calibrate_ladder(
  paths: Sequence[str],
  folder: str,
  overrides: Sequence[str] = (),
  *,
  split: str | None = None,
  ms: Costs | None = None,
) -> Calibrated:
  """Calibrates several runs as one ladder; leaves `ladder.json` in its folder.

  The cheapest network comes first. All else is as for `calibrate`: the split is
  of the same images for all, and the milliseconds of all their options.

  Raises:
    UserError: they know other classes or were given other images.
  """
  members = ladder.members(paths)
  for file, what in (('config.json', 'a run'), ('contract.json', 'an export')):
    if os.path.exists(os.path.join(folder, file)):
      raise UserError(
        f'{folder} holds {what}: name a new folder for the ladder'
      )
  subjects = {k: Subject(p, overrides) for k, p in members.items()}
  first = next(iter(subjects.values()))
  split = split or first.data.validation_split
  for subject in subjects.values():
    check_held_out(split, subject)
  if processes.is_main():  # first: it says whether one can write there
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  held_out = joined_record(subjects, split)
  test = joined_record(subjects, first.data.test_split)
  _check_disjoint(held_out, test, split)
  if processes.is_main():
    ladder.write(folder, paths)
  return _calibrated(folder, test, held_out, f'{first.data.name}/{split}', ms)


def joined_record(subjects: Mapping[str, Subject], split: str) -> Record:
  """What all options of several runs say of a split.

  The runs are named by their networks, the cheapest first.

  Raises:
    UserError: they know other classes or were given other images.
  """
  names = {k: s.trained.class_names for k, s in subjects.items()}
  if len(set(names.values())) > 1:
    raise UserError(f'{" and ".join(names)} do not know the same classes')
  records = {
    name: subject.record(split, name, keep_probabilities=True)
    for name, subject in subjects.items()
  }
  if len(records) == 1:
    return next(iter(records.values()))
  try:
    return record_lib.join(records)
  except ValueError as error:
    raise UserError(
      f'{" and ".join(records)} cannot be one ladder: {error}; train them on '
      'the same splits'
    ) from error


def _calibrated(
  folder: str, test: Record, held_out: Record, split: str, ms: Costs | None
) -> Calibrated:
  try:
    before = calibration_lib.read(folder)
  except UserError:  # it is about to be replaced anyway
    before = None
  if ms is None and before and before.options == held_out.options:
    ms = before.costs.get('ms')
  calibration = Calibration.of(held_out, split=split, ms=ms)
  return Calibrated(folder, test, held_out, calibration)


def check_held_out(split: str, subject: Subject) -> None:
  """Raises NotHeldOut if policies would be set on images for something else."""
  what = ''
  if split == subject.data.test_split:
    what = 'they are to be tested on'
  elif subject.learnt_from(split):
    what = 'the networks were trained on'
  if what:
    raise NotHeldOut(
      f'policies would be set on {split!r}, the images that {what}. Train with '
      f'--config.data.held_out=0.1 --config.data.validation_split={HELD_OUT} '
      f'(and, where there is nothing else to test on, test_split={TESTED}), '
      'name other images with calibrate --split, or estimate what policies '
      'give with --halves=10'
    )


def _check_disjoint(record: Record, test: Record, split: str) -> None:
  """Raises NotHeldOut if a split of another name holds test images."""
  if test.draw is None:
    return
  shared = float(np.isin(record.draw, test.draw).mean())
  if shared > _ALIKE:
    raise NotHeldOut(
      f'{shared:.0%} of the images of {split!r} are also in the test split: '
      'policies would be set on images that they are to be tested on. Name '
      'others with config.data.validation_split or calibrate --split'
    )
