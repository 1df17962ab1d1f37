# SPDX-License-Identifier: Apache-2.0
"""Command line: classifies image files with a trained model.

    python -m drnet_jax predict --workdir=runs/quick photo.png 'more/*.jpg' dir/

Prints, for each image, its class, how likely it is, the size chosen for it (or
the exit at which it left), what that cost and what the network at its full size
(or to its end) would have cost. Files that cannot be found or read are named at
the end, and the exit status is then 2.

`--workdir` may also name a folder that `drnet_jax export` wrote.
`--budget_gmacs`, `--budget_ms` or `--budget_accuracy` turn the dial (after
`drnet_jax calibrate`), `--size` runs every image at one size, `--exit` to one
exit; `--format=csv` or `json` (a line per image) is for other programs;
`--runtime=onnx` is the fastest on CPUs; `--decode=scaled` decodes large JPEGs
at a part of their size.
"""

import csv
import glob
import json
import os
import sys
from collections.abc import Callable, Sequence

from absl import flags
from PIL import Image

from drnet_jax import terminal
from drnet_jax.commands import cli
from drnet_jax.commands.flags import DECODE, RUNTIME
from drnet_jax.errors import UserError
from drnet_jax.serve.answers import Failure, Prediction
from drnet_jax.serve.classifier import Classifier

_BUDGETS = {
  'gmacs': flags.DEFINE_float('budget_gmacs', None, 'Average cost, GMACs.'),
  'ms': flags.DEFINE_float('budget_ms', None, 'Average cost, milliseconds.'),
  'accuracy': flags.DEFINE_float('budget_accuracy', None, 'Top-1 in [0, 1].'),
}
_SIZE = flags.DEFINE_integer('size', None, 'One size for all images, in px.', 1)
_EXIT = flags.DEFINE_integer('exit', None, 'One exit for all (RANet).', 1)
_TOP_K = flags.DEFINE_integer('top_k', 1, 'Classes to name for an image.', 1)
_FORMAT = flags.DEFINE_enum(
  'format', 'table', ('table', 'csv', 'json'), 'How to print the answers.'
)


def find_images(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """Expands folders and globs; files stay as they are.

  Returns:
    The images' paths, and what is wrong with arguments that led to none: a
    folder or a pattern that holds no image, a file that is not there.

  Raises:
    UserError: nothing led to an image.
  """
  paths, wrong = [], []
  for argument in arguments:
    if os.path.isdir(argument):
      endings = tuple(Image.registered_extensions())
      found = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(argument)
        for name in names
        if name.lower().endswith(endings)
      )
      what = 'folder'
    elif os.path.exists(argument):
      found, what = [argument], 'file'
    else:
      found, what = sorted(glob.glob(argument)), 'file or pattern'
    if not found:
      wrong.append(f'{what} {argument} holds no image')
    paths += found
  if not paths:
    raise UserError(_joined(wrong or ['name an image, a folder or a pattern']))
  return paths, wrong


def _joined(messages: Sequence[str]) -> str:
  return '\n       '.join(messages)  # under one another after 'error: '


def run(arguments: Sequence[str]) -> None:
  path = cli.workdir()
  paths, wrong = find_images(arguments)
  exported = os.path.exists(os.path.join(path, 'contract.json'))
  classifier = Classifier.load(
    path,
    runtime=RUNTIME.value or ('onnx' if exported else 'jax'),
    decode=DECODE.value,
    batch=1 if len(paths) == 1 else 0,
  )
  budgets = {k: f.value for k, f in _BUDGETS.items() if f.value is not None}
  if budgets and (_SIZE.value or _EXIT.value):
    raise UserError(
      '--size or --exit leaves nothing to choose: give it or a budget'
    )
  if budgets:
    classifier.set_budget(**budgets)
  elif _SIZE.value:
    classifier.set_size(_SIZE.value)
  elif _EXIT.value:
    classifier.set_exit(_EXIT.value)
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


def _print_table(answers: list[tuple[str, Prediction]]) -> None:
  rows = []
  for name, found in answers:
    row = {'image': name}
    for k, (class_name, probability) in enumerate(found.top):
      number = '' if k == 0 else f' {k + 1}'
      row[f'class{number}'] = class_name
      row[f'probability{number}'] = f'{probability:.3f}'
    rows.append(
      row
      | {
        'ran': found.option,
        'GMACs': f'{found.gmacs:.4g}',
        'in full': f'{found.full_gmacs:.4g}',
        'saved': f'{1 - found.gmacs / found.full_gmacs:.0%}',
      }
    )
  print(terminal.table(rows))


def _fields(name: str, found: Prediction) -> dict:
  return {
    'image': name,
    'label': found.label,
    'class': found.name,
    'probability': found.probability,
    'size_px': found.size_px,
    'exit': found.exit_number,
    'gmacs': found.gmacs,
    'full_gmacs': found.full_gmacs,
  }


def _print_csv(answers: list[tuple[str, Prediction]]) -> None:
  rows = []
  for name, found in answers:
    row = _fields(name, found)
    for k, (class_name, probability) in enumerate(found.top[1:], start=2):
      row |= {f'class_{k}': class_name, f'probability_{k}': probability}
    rows.append(row)
  writer = csv.DictWriter(sys.stdout, rows[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)


def _print_json(answers: list[tuple[str, Prediction]]) -> None:
  for name, found in answers:
    print(json.dumps(_fields(name, found) | {'top': found.top}))


_PRINTERS: dict[str, Callable] = {
  'table': _print_table,
  'csv': _print_csv,
  'json': _print_json,
}
