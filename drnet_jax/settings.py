# SPDX-License-Identifier: Apache-2.0
"""Config sections are keyword arguments: the signature is the schema.

A section of a config is handed whole to one function or dataclass, whose
parameters have no defaults for what a config holds. So every knob has one home
(where it is used and documented), and a missing or misspelt one is found before
any work is done.
"""

import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from drnet_jax.errors import UserError

# Fields that a newer version added to a section, each with the value that does
# what was done before: what an older run's config.json says by not having them.
_ADDED = {'data': {'max_pixels': 0, 'keys': ['image', 'label']}}


def completed(config: dict[str, Any]) -> dict[str, Any]:
  """A run's config with the fields that its version did not have."""
  sections = {
    name: fields | config[name]
    for name, fields in _ADDED.items()
    if name in config
  }
  return config | sections


def call(
  function: Callable, section: Mapping[str, Any], path: str, *args, **given
):
  """Calls `function(*args, **given, **section)`.

  Args:
    function: its keyword-only parameters, less `given`, are the fields.
    section: the config's values for them.
    path: of the section as the user writes it, for instance 'config.data'.
    *args: passed on.
    **given: passed on; not the config's to set.

  Raises:
    UserError: a field is missing or unknown.
  """
  if not isinstance(section, Mapping | ml_collections.ConfigDict):
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
  return function(*args, **given, **dict(section))


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """A config as JSON would give it back: dicts, lists, numbers, strings."""
  return json.loads(json.dumps(config.to_dict()))


def differences(ours: Mapping, theirs: Mapping, path: str) -> list[str]:
  """Fields in which two plain configs differ, each with both values."""
  found = []
  for name in sorted({*ours, *theirs}):
    here, there = ours.get(name), theirs.get(name)
    if isinstance(here, Mapping) and isinstance(there, Mapping):
      found += differences(here, there, f'{path}.{name}')
    elif here != there:
      found.append(f'{path}.{name} = {here!r} here, {there!r} there')
  return found


def write_json(path: str, value: Any) -> None:
  """Writes a file that is there whole or not at all."""
  partial = f'{path}.partial'
  with open(partial, 'w') as file:
    json.dump(value, file, indent=2)
  os.replace(partial, path)
