# SPDX-License-Identifier: Apache-2.0
"""What this machine need not work out twice: programs, graphs, measurements.

All of it is under `$XDG_CACHE_HOME/drnet_jax` (by default `~/.cache`) and may
be deleted at any time. An entry is there whole or not at all, also where
several processes write it. Its key covers all that it depends on, so no entry
is ever changed.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

_KEPT_S = 30 * 24 * 3600  # after so long unused, a folder is removed


def path(*parts: str) -> str:
  """A path within the cache."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return os.path.join(os.path.expanduser(home), 'drnet_jax', *parts)


def key(*parts: Any) -> str:
  """A name for what depends on these: bytes, or what JSON can hold."""
  whole = hashlib.sha256()
  for part in parts:
    if not isinstance(part, bytes):
      part = json.dumps(part, sort_keys=True).encode()
    whole.update(hashlib.sha256(part).digest())
  return whole.hexdigest()[:32]


def stamps(paths: Iterable[str]) -> list[tuple[str, int, int]]:
  """Name, bytes and time of change (ns) of files, and of all in folders."""
  found = []
  for start in paths:
    files = [start] if os.path.isfile(start) else []
    for folder, _, names in os.walk(start, followlinks=True):
      files += [os.path.join(folder, name) for name in names]
    parent = os.path.dirname(start)
    for file in files:
      status = os.stat(file)
      name = os.path.relpath(file, parent)
      found.append((name, status.st_size, status.st_mtime_ns))
  return sorted(found)


@functools.cache
def code() -> str:
  """A key of this package's code: names, sizes and times of its files."""
  package = os.path.dirname(os.path.abspath(__file__))
  files = [x for x in stamps([package]) if x[0].endswith('.py')]
  return key(files)


def read_json(kind: str, name: str) -> Any:
  """What `write_json` left; None if there is nothing, or it is damaged."""
  file = path(kind, f'{name}.json')
  try:
    with open(file) as opened:
      found = json.load(opened)
  except (OSError, ValueError):
    return None
  with contextlib.suppress(OSError):  # it may be another user's
    os.utime(file)
  return found


def write_json(kind: str, name: str, value: Any) -> None:
  """Keeps a value, unless the disk is full or may not be written to."""
  with contextlib.suppress(OSError):
    os.makedirs(path(kind), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path(kind)) as place:
      partial = os.path.join(place, name)
      with open(partial, 'w') as file:
        json.dump(value, file)
      os.replace(partial, path(kind, f'{name}.json'))


def folder(kind: str, name: str) -> str | None:
  """A folder that `make_folder` made; None if it did not."""
  found = path(kind, name)
  if not os.path.isdir(found):
    return None
  with contextlib.suppress(OSError):  # it may be another user's
    os.utime(found)
  return found


def make_folder(kind: str, name: str, write: Callable[[str], None]) -> str:
  """Makes a folder of the cache, and removes those long unused of its kind.

  `write` is called with an empty folder to fill. Returns the path of the filled
  one: in the cache or, where that cannot be written to, a temporary one that
  goes when this process ends.
  """
  try:
    os.makedirs(path(kind), exist_ok=True)
    _clear(path(kind))
    partial = tempfile.mkdtemp(dir=path(kind))
    try:
      write(partial)
      os.chmod(partial, 0o755)
      # Another process may have been faster; its folder is the same.
      with contextlib.suppress(OSError):
        os.rename(partial, path(kind, name))
    finally:
      shutil.rmtree(partial, ignore_errors=True)
    return path(kind, name)
  except OSError:  # no permission, or no room
    made = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    write(made)
    return made


def _clear(directory: str) -> None:
  for entry in os.scandir(directory):
    with contextlib.suppress(FileNotFoundError):  # another process clears, too
      if time.time() - entry.stat().st_mtime > _KEPT_S:
        shutil.rmtree(entry.path, ignore_errors=True)
