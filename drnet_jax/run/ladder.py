# SPDX-License-Identifier: Apache-2.0
"""A ladder: several runs of the same classes, the cheapest network first.

`calibrate` of several workdirs leaves a folder with `ladder.json`, which names
them, beside the calibration.
"""

import json
import os
from collections.abc import Sequence

from drnet_jax import settings
from drnet_jax.errors import UserError

FILE = 'ladder.json'


def is_ladder(path: str) -> bool:
  """Whether a folder holds a ladder."""
  return os.path.exists(os.path.join(path, FILE))


def members(paths: str | Sequence[str]) -> dict[str, str]:
  """Workdirs by short names: of several paths, or as a ladder's folder lists.

  Raises:
    UserError: fewer than two, or the folder's file is damaged.
  """
  if isinstance(paths, str):
    file = os.path.join(paths, FILE)
    try:
      with open(file) as opened:
        listed = json.load(opened)['members']
      paths = [os.path.normpath(os.path.join(paths, p)) for p in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{file} is damaged ({error}): calibrate the ladder again'
      ) from error
  if len(paths) < 2:
    raise UserError('a ladder takes at least two workdirs')
  return dict(zip(short_names(paths), paths, strict=True))


def short_names(paths: Sequence[str]) -> list[str]:
  """Names of folders, as short as tells them apart, however they are written.

  Raises:
    UserError: one is named twice.
  """
  full = [os.path.abspath(path) for path in paths]
  if len(set(full)) < len(full):
    raise UserError(f'{", ".join(paths)}: name each folder once')
  names = [os.path.basename(path) for path in full]
  if len(set(names)) < len(names):
    common = os.path.commonpath(full)
    names = [os.path.relpath(path, common) for path in full]
  return names


def write(folder: str, paths: Sequence[str]) -> None:
  """Makes a folder one that `members` reads."""
  listed = [os.path.relpath(path, folder) for path in paths]
  settings.write_json(os.path.join(folder, FILE), {'members': listed})
