# SPDX-License-Identifier: Apache-2.0
"""Command line: trained models of either method on one plot.

    python -m drnet_jax compare --workdirs=runs/a,runs/b --folder=runs/both

The dial of each model (run `calibrate` first) is set to several average costs.
What a setting scores and costs in multiply-adds is that of the whole test
split; milliseconds are measured here, on files of that split, decoding
included: in bulk or (`--one_by_one`) each image by itself, all settings of all
models in turn. Leaves `compare.csv` and the figure `compare`: accuracy against
multiply-adds, and against milliseconds.
"""

import csv
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from drnet_jax import settings, terminal
from drnet_jax.bench.stopwatch import interleaved
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError
from drnet_jax.report import figures
from drnet_jax.report.policies import Policy
from drnet_jax.run import workdir
from drnet_jax.run.evaluate import test_record
from drnet_jax.serve import exit_budget
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.early_exit import EarlyExitClassifier

_WORKDIRS = flags.DEFINE_list('workdirs', [], 'Calibrated runs to compare.')
_FOLDER = flags.DEFINE_string('folder', None, 'For table and figure.')
_SETTINGS = flags.DEFINE_integer('settings', 6, 'Settings of each dial.', 2)
_IMAGES = flags.DEFINE_integer('timed_images', 400, 'Images to time.', 1)
_ROUNDS = flags.DEFINE_integer('timed_rounds', 5, 'Timed rounds.', 1)
_SINGLY = flags.DEFINE_bool('one_by_one', False, 'Time each image by itself.')


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model and what its dial promises.

  Attributes:
    name: for people.
    classifier: runs it.
    points: settings of the dial.
    scores: what each gives on the test split.
    labels: int [N], of the test split.
    files: images to time.
  """

  name: str
  classifier: Classifier | EarlyExitClassifier
  points: Sequence[Any]
  scores: Sequence[Policy]
  labels: np.ndarray
  files: Sequence[Any]


def subject(path: str, *, points: int, images: int) -> Subject:
  """A calibrated run.

  Args:
    path: its workdir.
    points: settings of the dial, evenly from its cheapest to its dearest.
    images: of the test split, to time.
  """
  calibration = exit_budget.read(path)
  if calibration is None:
    raise UserError(
      f'{path} is not calibrated: python -m drnet_jax calibrate '
      f'--workdir={path}'
    )
  record = test_record(path)
  data = settings.call(Data, workdir.read_config(path).data, 'config.data')
  examples = data.open(data.test_split).examples
  found = calibration.points(calibration.gmacs, points)
  return Subject(
    name=path,
    classifier=Classifier.load(path),
    points=found,
    scores=[calibration.score(point, record) for point in found],
    labels=record.label,
    files=[examples[i]['image'] for i in range(min(images, len(examples)))],
  )


def measure(
  subjects: Sequence[Subject], *, rounds: int, singly: bool
) -> list[dict[str, Any]]:
  """Times every setting of every model.

  Args:
    subjects: tested on the same images.
    rounds: timed ones; medians count.
    singly: each image by itself, instead of in bulk.

  Returns:
    A row for each setting: 'model', 'gmacs', 'ms_per_image', 'top1', and
    'timed_gmacs', the cost of the very images that were timed.
  """
  first = subjects[0]
  for other in subjects[1:]:
    if not np.array_equal(first.labels, other.labels):
      raise UserError(
        f'{first.name} and {other.name} were tested on different images: '
        'their accuracies cannot be compared'
      )
  spent: dict[Any, float] = {}
  jobs = {
    (i, j): functools.partial(_predict, one, point, singly, spent, (i, j))
    for i, one in enumerate(subjects)
    for j, point in enumerate(one.points)
  }
  rows = []
  for (i, j), seconds in interleaved(jobs, rounds, 'settings').items():
    score = subjects[i].scores[j]
    rows.append(
      {
        'model': subjects[i].name,
        'gmacs': score.gmacs,
        'timed_gmacs': spent[i, j],
        'ms_per_image': 1e3 * float(np.median(seconds)) / len(first.files),
        'top1': score.top1,
      }
    )
  return rows


def _predict(one: Subject, point, singly, spent, key) -> None:
  one.classifier.set_point(point)
  calls = [[file] for file in one.files] if singly else [one.files]
  answers = [x for call in calls for x in one.classifier.predict(call)]
  spent[key] = float(np.mean([x.gmacs for x in answers]))


def run(arguments: Sequence[str]) -> None:
  if not (_WORKDIRS.value and _FOLDER.value):
    raise UserError('give --workdirs, separated by commas, and --folder')
  subjects = [
    subject(path, points=_SETTINGS.value, images=_IMAGES.value)
    for path in _WORKDIRS.value
  ]
  rows = measure(subjects, rounds=_ROUNDS.value, singly=_SINGLY.value)
  print(
    terminal.table(
      [
        {
          'model': row['model'],
          'MMACs': f'{1e3 * row["gmacs"]:.4g}',
          'ms': f'{row["ms_per_image"]:.4g}',
          'top-1 %': f'{100 * row["top1"]:.2f}',
        }
        for row in rows
      ]
    )
  )
  os.makedirs(_FOLDER.value, exist_ok=True)
  path = os.path.join(_FOLDER.value, 'compare')
  with open(path + '.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  figures.models(rows, path)
  print(f'Written: {path}.csv, .png, .svg')
