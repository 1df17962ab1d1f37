# SPDX-License-Identifier: Apache-2.0
"""Config sections are keyword arguments: the signature is the schema.

A section of a config is handed whole to one function or dataclass, whose
parameters have no defaults for what a config holds. So every knob has one home
(where it is used and documented), and a missing or misspelt one is found before
any work is done.
"""

import dataclasses
import difflib
import fnmatch
import inspect
import json
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import (
  TYPE_CHECKING,
  Annotated,
  Any,
  Literal,
  Union,
  get_args,
  get_origin,
)

from absl import flags

from drnet_jax.errors import UserError

if TYPE_CHECKING:  # not every command reads a config
  import ml_collections

# Fields that older versions lacked, at the value they behaved as: by section of
# the config or, for stages, by section of the stage.
_ADDED = {
  'data': {
    'max_pixels': 0,
    'keys': ['image', 'label'],
    'class_map': '',
    'unlabelled': '',
    'least_epoch_images': 0,
    'least_crop': 0.08,
  },
  'optimizer': {'head_lr': 1.0},
  'objective': {'teacher': 'largest'},  # of steps that can distil
}


def completed(config: dict[str, Any]) -> dict[str, Any]:
  """A run's config with the fields that its version did not have."""
  found = dict(config)
  if 'data' in found:
    found['data'] = _ADDED['data'] | found['data']
  for name, section in config.items():
    if isinstance(section, Mapping) and 'step' in section:
      parts = {'optimizer': _ADDED['optimizer'] | section['optimizer']}
      if section['step'] == 'pretrain':
        parts['objective'] = _ADDED['objective'] | section['objective']
      found[name] = dict(section) | parts
  return found


@dataclasses.dataclass(frozen=True)
class In:
  """Bounds of a number, as mathematics writes them: `In('(0, 1]')`."""

  bounds: str

  def __contains__(self, x: float) -> bool:
    low, high = map(float, self.bounds[1:-1].split(','))
    return (
      low < x < high
      or (x == low and self.bounds[0] == '[')
      or (x == high and self.bounds[-1] == ']')
    )


# What fields are annotated with, for `check`.
Share = Annotated[float, In('[0, 1]')]
BelowOne = Annotated[float, In('[0, 1)')]
Positive = Annotated[float, In('(0, inf)')]
NotNegative = Annotated[float, In('[0, inf)')]
Epochs = Annotated[float, In('[0, 1e6]')]
Whole = Annotated[int, In('[0, 2147483647]')]
Natural = Annotated[int, In('[1, 2147483647]')]
Pixels = Annotated[int, In('[1, 65536]')]
Path = Annotated[str, 'path']  # `~` is the home of whoever runs it

_KINDS = {
  int: 'a whole number',
  float: 'a number',
  bool: 'True or False',
  str: 'text',
  types.NoneType: 'None',
}


def call(function: Callable, section: Mapping[str, Any], path: str, **given):
  """Calls `function(**given, **section)`.

  Args:
    function: its keyword-only parameters, less `given`, are the fields.
    section: the config's values for them.
    path: of the section as the user writes it, for instance 'config.data'.
    **given: passed on; not the config's to set.

  Raises:
    UserError: as `check`.
  """
  fields = check(function, section, path, *given)
  values = {
    name: os.path.expanduser(value) if fields[name] == Path else value
    for name, value in section.items()
  }
  return function(**given, **values)


def check(
  function: Callable, section: Mapping[str, Any], path: str, *given: str
) -> dict[str, Any]:
  """Checks what `call` would hand on; returns each field's annotation.

  Raises:
    UserError: a field is missing or unknown, or its value is not of its kind.
  """
  if not is_section(section):
    raise UserError(f'{path} should be a section of fields, not {section!r}')
  fields = {
    name: parameter
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in given
  }
  for name in section:
    if name not in fields:
      close = difflib.get_close_matches(name, fields, 1) or sorted(fields)
      raise UserError(
        f'{path}.{name} is not a known field; did you mean {" or ".join(close)}'
        '?'
      )
  for name, parameter in fields.items():
    if parameter.default is parameter.empty and name not in section:
      raise UserError(f'{path}.{name} is missing; see configs/quickstart.py')
  hints = {name: parameter.annotation for name, parameter in fields.items()}
  check_values(hints, section, path)
  return hints


def check_values(
  hints: Mapping[str, Any], section: Mapping[str, Any], path: str
) -> None:
  """Raises UserError unless each value is of the kind its hint says.

  Args:
    hints: what fields are annotated with; one of no kind known here (`Any`, a
      string) lets everything pass.
    section: values of some of them.
    path: of the section.
  """
  for name, value in section.items():
    if not _fits(hints[name], value):
      shown = tuple(value) if isinstance(value, list) else value
      raise UserError(f'{path}.{name} = {shown!r} is not {_words(hints[name])}')


def _fits(hint: Any, value: Any) -> bool:
  origin, inner = get_origin(hint), get_args(hint)
  is_list = isinstance(value, Sequence) and not isinstance(value, str)
  if origin is Annotated:
    bounds = [x for x in inner[1:] if isinstance(x, In)]
    return _fits(inner[0], value) and all(value in x for x in bounds)
  if origin is Literal:  # not `in`: True == 1
    return any(type(value) is type(x) and value == x for x in inner)
  if origin in (Union, types.UnionType):
    return any(_fits(x, value) for x in inner)
  if origin is Sequence or inner[1:] == (...,):  # tuple[X, ...]
    return is_list and all(_fits(inner[0], x) for x in value)
  if origin is tuple:
    is_as_long = is_list and len(value) == len(inner)
    return is_as_long and all(map(_fits, inner, value))
  if origin is Mapping:
    return is_section(value)
  if hint is float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -float('inf') < value < float('inf')
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  is_known = isinstance(hint, type) and hint in _KINDS
  return not is_known or isinstance(value, hint)


def _words(hint: Any) -> str:
  origin, inner = get_origin(hint), get_args(hint)
  if origin is Annotated:
    bounds = [f' in {x.bounds}' for x in inner[1:] if isinstance(x, In)]
    return ''.join([_words(inner[0]), *bounds])
  if origin is Literal:
    return 'one of ' + ', '.join(map(repr, inner))
  if origin in (Union, types.UnionType):
    return ' or '.join(map(_words, inner))
  if origin is Sequence or inner[1:] == (...,):
    return f'a list, each {_words(inner[0])}'
  if origin is tuple:
    return f'({", ".join(map(_words, inner))})'
  return _KINDS.get(hint, 'a section of fields')


def field(config: 'ml_collections.ConfigDict', name: str) -> Any:
  """What a config holds under a name; UserError if it holds nothing there."""
  if name not in config:
    raise UserError(f'config.{name} is missing; see configs/quickstart.py')
  return config[name]


def is_section(value: Any) -> bool:
  """Whether a config's value holds fields of its own."""
  import ml_collections

  return isinstance(value, Mapping | ml_collections.ConfigDict)


def plain(config: 'ml_collections.ConfigDict') -> dict[str, Any]:
  """A config as JSON would give it back: dicts, lists, numbers, strings."""
  return json.loads(json.dumps(config.to_dict()))


def differences(
  ours: Mapping, theirs: Mapping, path: str
) -> dict[str, tuple[Any, Any]]:
  """Fields in which two plain configs differ, each with both values."""
  found = {}
  for name in sorted({*ours, *theirs}):
    here, there = ours.get(name), theirs.get(name)
    if isinstance(here, Mapping) and isinstance(there, Mapping):
      found |= differences(here, there, f'{path}.{name}')
    elif here != there:
      found[f'{path}.{name}'] = here, there
  return found


def matches(field: str, patterns: Sequence[str]) -> bool:
  """Whether `fnmatch` finds a field, 'config.data.threads', among these."""
  return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)


def overridden(
  config: 'ml_collections.ConfigDict',
  overrides: Sequence[str],
  fields: Sequence[str],
) -> 'ml_collections.ConfigDict':
  """A config with some fields as the command line gives them.

  Args:
    config: left as it is.
    overrides: '--config.<field>=<value>'.
    fields: which may be given so, see `matches`.

  Raises:
    UserError: another field is given, or a value that cannot be read.
  """
  for override in overrides:
    field, is_given, _ = override.removeprefix('--').partition('=')
    if not (is_given and matches(field, fields)):
      raise UserError(
        f'{override!r} is not --<field>=<value> with one of the fields '
        f'{", ".join(fields)}: all else is as the run was trained'
      )
  from ml_collections import config_flags

  config = config.copy_and_resolve_references()
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      'config',
      config,
      flag_values=values,
      lock_config=False,
      accept_new_attributes=True,  # which configs of older runs lack
      sys_argv=list(overrides),
    )
    values(['', *overrides])
  except flags.Error as error:
    raise UserError(str(error)) from error
  except (LookupError, TypeError, ValueError) as error:
    raise UserError(f'{" ".join(overrides)}: {error}') from error
  return config


def read_json(path: str) -> Any:
  """What `write_json` wrote.

  Raises:
    UserError: the file is missing, or is not what was written.
  """
  try:
    with open(path) as file:
      return json.load(file)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {error}') from error


def write_json(path: str, value: Any) -> None:
  """Writes a file that is there whole or not at all."""
  partial = f'{path}.{os.getpid()}.partial'
  with open(partial, 'w') as file:
    json.dump(value, file, indent=2)
  os.replace(partial, path)
