# SPDX-License-Identifier: Apache-2.0
"""Several calibrated models at several budgets: accuracy, cost and time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from drnet_jax.bench import stopwatch
from drnet_jax.bench.subjects import Predictions, spread
from drnet_jax.choosing import scores
from drnet_jax.choosing.policy import Policy, describe, fixed
from drnet_jax.choosing.record import Record
from drnet_jax.errors import UserError
from drnet_jax.report import evaluated
from drnet_jax.run import workdir
from drnet_jax.serve.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model, the policies to time it by, and what it said of the test split."""

  name: str
  classifier: Classifier
  policies: Sequence[Policy]
  record: Record
  files: Sequence[Any]


def subject(
  path: str, *, policy: str, settings: int, images: int, runtime: str = 'jax'
) -> Subject:
  """A calibrated run, or ladder, by its folder.

  Its policies are so many `settings` of a family (or of 'best'), evenly from
  the cheapest to the most accurate, and as a measure of them the most expensive
  option; so many `images` of the test split are there to time.

  Raises:
    UserError: it is not evaluated, or not calibrated for its weights.
  """
  run = evaluated.read(path)
  classifier = run.calibration and Classifier.load(path, runtime=runtime)
  if not (classifier and classifier.calibration):
    raise UserError(
      f'{path} is not calibrated for its weights: '
      f'{evaluated.how_to_calibrate(path)}'
    )
  points = run.calibration.family('GMACs', policy)
  some = np.linspace(0, len(points) - 1, settings).round().astype(int)
  full = fixed(int(run.record.gmacs.argmax()))
  split = run.config.data.test_split
  _, source = workdir.open_split(run.first, run.config, split, run.class_names)
  return Subject(
    name=path,
    classifier=classifier,
    policies=list(dict.fromkeys([*(points[i].policy for i in some), full])),
    record=run.record,
    files=[example['image'] for example in spread(source.examples, images)],
  )


def measure(
  subjects: Sequence[Subject], *, rounds: int, singly: bool
) -> list[dict[str, Any]]:
  """Times every policy of every model, in bulk or `singly`: a row for each.

  'timed_gmacs' is the cost of the very images that were timed. Over the most
  expensive policy of the model, on those images, a speed-up is 'implied' by
  multiply-adds, and 'realised' as the median ratio of times.

  Raises:
    UserError: the models were tested on different images.
  """
  first = subjects[0]
  for other in subjects[1:]:
    if not np.array_equal(first.record.label, other.record.label):
      raise UserError(
        f'{first.name} and {other.name} were tested on different images: '
        'their accuracies cannot be compared'
      )
  jobs = {
    (i, j): Predictions(one.classifier, policy, one.files, singly)
    for i, one in enumerate(subjects)
    for j, policy in enumerate(one.policies)
  }
  rows, times = [], stopwatch.interleaved(jobs, rounds, 'policies')
  for (i, j), seconds in times.items():
    one, gmacs = subjects[i], jobs[i, j].gmacs
    policy = one.policies[j]
    promised = scores.score(policy, one.record, one.name)
    of_model = [key for key in jobs if key[0] == i]
    full = max(of_model, key=lambda key: jobs[key].gmacs)
    rows.append(
      {
        'model': one.name,
        'gmacs': promised.gmacs,
        'timed_gmacs': gmacs,
        'implied': jobs[full].gmacs / gmacs,
        'realised': float(np.median(np.divide(times[full], seconds))),
        'ms_per_image': stopwatch.ms(seconds, len(one.files)),
        'top1': promised.top1,
        'policy': describe(policy, one.classifier.contract.options),
      }
    )
  return rows
