# SPDX-License-Identifier: Apache-2.0
"""Classifies image files with a trained model.

    python -m drnet_jax predict --workdir=runs/quick photo.png 'more/*.jpg' dir/

Prints, for each image, its class, how likely it is, the option at which it left
(a size, or an exit), what that cost and what the most expensive option costs.
Files that cannot be found or read are named at the end, and the exit status is
then 2.

`--workdir` may also name a folder that `export` wrote, or several workdirs with
commas between: a ladder, the cheapest network first. `--policy`,
`--budget_gmacs`, `--budget_ms` and `--budget_accuracy` say how much work images
get; `--size` runs every image at one size, `--exit` to one exit;
`--format=csv` or `json` (a line per image) is for other programs;
`--decode=scaled` decodes large JPEGs at a part of their size.

What runs the networks is said on standard error: on a CPU the fastest of JAX,
onnxruntime and OpenVINO, of those that are installed and agree, as the first
call finds out; `--runtime` names one, `--precision` what OpenVINO computes in.
"""

import collections
import glob
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.commands.flags import (
  A_POLICY,
  AN_OPTION,
  DECODE,
  PRECISION,
  RUNTIME,
  set_policy,
)
from drnet_jax.errors import UserError

USES = ('runtime', 'precision', 'decode', *A_POLICY, *AN_OPTION)
_TOP_K = flags.DEFINE_integer(
  'top_k', 1, 'Number of classes to list per image.', 1
)
_FORMAT = flags.DEFINE_enum(
  'format', 'table', ('table', 'csv', 'json'), 'Output format.'
)


def find_images(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """Expands folders and globs; files stay as they are.

  What else is in a folder is counted on standard error.

  Returns:
    The images' paths, and what is wrong with arguments that led to none: a
    folder or a pattern that holds no image, a file that is not there.

  Raises:
    UserError: nothing led to an image.
  """
  from drnet_jax.data import folder

  paths, wrong = [], []
  for argument in arguments:
    left_out = collections.Counter()
    matches, what = [argument], 'folder'
    if not os.path.exists(argument):
      matches, what = sorted(glob.glob(argument)), 'file or pattern'
    found = []
    for match in matches:
      is_folder = os.path.isdir(match)
      found += folder.images(match, left_out) if is_folder else [match]
    others = folder.describe(left_out)
    if not found:
      said = f'{what} {argument} '
      said += 'holds no image' if matches else 'does not exist'
      wrong.append(f'{said}; {others}' if others else said)
    elif others:
      print(f'{argument}: {others}', file=sys.stderr)
    paths += found
  if not paths:
    raise UserError(_joined(wrong or ['name an image, a folder or a pattern']))
  return paths, wrong


def _joined(messages: Sequence[str]) -> str:
  return '\n       '.join(messages)  # under one another after 'error: '


def run(arguments: Sequence[str]) -> None:
  path = cli.model()
  paths, wrong = find_images(arguments)
  from drnet_jax.serve.answers import Failure, Prediction
  from drnet_jax.serve.classifier import Classifier

  classifier = Classifier.load(
    path,
    runtime=RUNTIME.value,
    precision=PRECISION.value,
    decode=DECODE.value,
    batch=1 if len(paths) == 1 else 0,
  )
  print(f'Runs in {classifier.runtime}', file=sys.stderr)
  set_policy(classifier)
  answers = classifier.predict(paths, top_k=_TOP_K.value, on_error='return')
  good = [
    (name, x)
    for name, x in zip(paths, answers, strict=True)
    if isinstance(x, Prediction)
  ]
  if good:
    _PRINTERS[_FORMAT.value](good)
  wrong += [x.reason for x in answers if isinstance(x, Failure)]
  if wrong:
    raise UserError(_joined(wrong))


def _print_table(answers: list[tuple[str, Any]]) -> None:
  from drnet_jax import terminal

  rows = []
  for name, found in answers:
    row = {'image': name}
    for k, (class_name, probability) in enumerate(found.top):
      number = '' if k == 0 else f' {k + 1}'
      row[f'class{number}'] = class_name
      row[f'probability{number}'] = f'{probability:.3f}'
    row |= {
      'ran': ', '.join(found.ran),
      'GMACs': f'{found.gmacs:.4g}',
      'in full': f'{found.full_gmacs:.4g}',
      'saved': f'{1 - found.gmacs / found.full_gmacs:.0%}',
    }
    rows.append(row)
  print(terminal.table(rows))


def _fields(name: str, found: Any) -> dict:
  return {
    'image': name,
    'label': found.label,
    'class': found.name,
    'probability': found.probability,
    'option': found.option,
    'size_px': found.size_px,
    'ran': '; '.join(found.ran),
    'gmacs': found.gmacs,
    'full_gmacs': found.full_gmacs,
  }


def _print_csv(answers: list[tuple[str, Any]]) -> None:
  import csv

  rows = []
  for name, found in answers:
    row = _fields(name, found)
    for k, (class_name, probability) in enumerate(found.top[1:], start=2):
      row |= {f'class_{k}': class_name, f'probability_{k}': probability}
    rows.append(row)
  writer = csv.DictWriter(sys.stdout, rows[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)


def _print_json(answers: list[tuple[str, Any]]) -> None:
  import json

  for name, found in answers:
    print(json.dumps(_fields(name, found) | {'top': found.top}))


_PRINTERS = {'table': _print_table, 'csv': _print_csv, 'json': _print_json}
