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
  names = [os.path.basename(os.path.abspath(path)) for path in paths]
  if len(set(names)) < len(names):
    names = list(paths)
  return dict(zip(names, paths, strict=True))


def write(folder: str, paths: Sequence[str]) -> None:
  """Leaves a folder that `members` reads."""
  os.makedirs(folder, exist_ok=True)
  listed = [os.path.relpath(path, folder) for path in paths]
  settings.write_json(os.path.join(folder, FILE), {'members': listed})
