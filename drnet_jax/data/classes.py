# SPDX-License-Identifier: Apache-2.0
"""Names of classes: those of the data against those of a model.

A label is an index, and an index means nothing without the list of names that
it was made with. So wherever data meets a model the two lists are compared.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from drnet_jax.data import selection
from drnet_jax.errors import UserError

if TYPE_CHECKING:  # a checkpoint has classes, and is read without data sets
  from drnet_jax.data.sources import Source

_SHOWN = 5


def difference(model: Sequence[str], data: Sequence[str]) -> str:
  """How the classes of data differ from a model's, in words; '' if not."""
  if tuple(model) == tuple(data):
    return ''
  known, found = set(model), set(data)
  gone = [name for name in model if name not in found]
  new = [name for name in data if name not in known]
  renamed = [(a, b) for a, b in zip(model, data, strict=False) if a != b]
  if len(model) == len(data) and len(renamed) == len(gone) == len(new):
    return 'renamed: ' + _some([f'{a!r} is now {b!r}' for a, b in renamed])
  changes = {'added': new, 'missing': gone}
  parts = [f'{k}: {_some(map(repr, v))}' for k, v in changes.items() if v]
  return '; '.join(parts) or 'the same names, but in another order'


def matched(
  source: 'Source', names: Sequence[str], renames: Mapping[str, str], where: str
) -> 'Source':
  """A split with a model's labels.

  Labels follow names: data that lists the model's classes, `names` in label
  order, in another order is given the model's. Anything else is a mistake,
  unless `renames`, the model's name of some of the data's classes, says that it
  is meant; then some of the model's classes may be without images.

  Raises:
    UserError: the classes of the split, called `where`, are not the model's.
  """
  names = tuple(names)
  found = tuple(renames.get(name, name) for name in source.class_names)
  if found != names:
    is_one_each = len(set(names)) == len(names)
    as_meant = set(found) <= set(names) and renames
    if not (is_one_each and (as_meant or sorted(found) == sorted(names))):
      raise UserError(
        f'{where} has other classes than the model: '
        f'{difference(names, found)}. Name the data it was trained on in '
        'config.data, or say which class is which: --config.data.class_map=a '
        'JSON file {"name in the data": "name in the model"}'
      )
    rows, labels = range(len(source.examples)), [names.index(x) for x in found]
    examples = selection.Some(source.examples, rows, labels)
    source = dataclasses.replace(source, examples=examples)
  return dataclasses.replace(source, class_names=names)


def read_map(path: str) -> dict[str, str]:
  """What `config.data.class_map` says; {} for ''.

  Raises:
    UserError: it cannot be read, or is not a map from names to names.
  """
  if not path:
    return {}
  try:
    with open(path, encoding='utf-8-sig') as file:
      found = json.load(file)
  except (OSError, ValueError) as error:
    raise UserError(f'config.data.class_map = {path!r}: {error}') from error
  if not isinstance(found, dict) or not all(
    isinstance(x, str) for x in found.values()
  ):
    raise UserError(
      f'config.data.class_map = {path!r} is not of the form '
      '{"name in the data": "name in the model", ...}'
    )
  return found


def _some(items) -> str:
  items = list(items)
  more = f' and {len(items) - _SHOWN} more' if len(items) > _SHOWN else ''
  return ', '.join(items[:_SHOWN]) + more
