# SPDX-License-Identifier: Apache-2.0
"""Data sets that are folders of images, `<root>/<split>/<class>/**/*.jpg`."""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

from drnet_jax import terminal
from drnet_jax.data import pixels, selection
from drnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Files:
  """Examples that are files of their own: {'image': path, 'label': index}."""

  paths: tuple[str, ...]
  labels: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, i: SupportsIndex) -> dict[str, Any]:
    return {'image': self.paths[i], 'label': self.labels[i]}

  def name(self, i: int) -> str:
    return self.paths[i]


def load(
  root: str, split: str, kept: Sequence[str], images_per_class: int
) -> tuple[Files, tuple[str, ...]]:
  """Returns the examples of a split and the names of its classes.

  A class is a folder with an image in it. What else lies there is counted in
  one line, once for a split in each process.

  Args are those of `sources.load`: `root` is its `data_dir`, `kept` the names
  that its `classes` lists.

  Raises:
    UserError: a folder is missing, or holds no image.
  """
  splits = _folders(root, 'splits')
  if split not in splits:
    raise UserError(
      f'{root} has no split {split!r}, only {", ".join(splits)}: name others '
      'with config.data.train_split, validation_split and test_split, or '
      "'held_out', the images that config.data.held_out takes from training"
    )
  path = os.path.join(root, split)
  left_out: collections.Counter[str] = collections.Counter()
  files = {}
  for name in _folders(path, 'classes'):
    if not kept or name in kept:
      files[name] = images(os.path.join(path, name), left_out)
      left_out['classes without an image'] += not files[name]
  loose = [x.name for x in os.scandir(path) if _is(x.is_file)]
  left_out['images in no class'] += sum(
    os.path.splitext(name)[1].lower() in pixels.endings()
    for name in loose
    if not name.startswith('.')
  )
  _say_once(path, describe(left_out))
  found = [name for name, of_class in files.items() if of_class]
  if not found and not kept:
    raise UserError(f'{path} holds no image; {describe(left_out)}')
  names, _ = selection.classes(found, kept, path)
  paths, labels = [], []
  for label, name in enumerate(names):
    for i in selection.drawn(len(files[name]), images_per_class, label):
      paths.append(files[name][i])
      labels.append(label)
  return Files(tuple(paths), tuple(labels)), names


def class_names(root: str, split: str) -> tuple[str, ...]:
  """Names of the classes of a split."""
  path, ignored = os.path.join(root, split), collections.Counter()
  found = _folders(path, 'classes')
  return tuple(x for x in found if any(_walk(os.path.join(path, x), ignored)))


def images(path: str, left_out: collections.Counter) -> list[str]:
  """Paths of all images in a folder and the folders in it, sorted.

  Links are followed, to a folder once. The ending of its name makes a file an
  image, unless the name begins with a dot. All other entries are counted in
  `left_out`, see `describe`.
  """
  return sorted(_walk(path, left_out))


def describe(left_out: collections.Counter) -> str:
  """'left out: 3 .heic, 2 hidden'; '' for nothing."""
  counts = [f'{n} {what}' for what, n in left_out.most_common() if n]
  return 'left out: ' + ', '.join(counts) if counts else ''


def _walk(top: str, left_out: collections.Counter) -> Iterator[str]:
  waiting, seen = [top], set()
  while waiting:
    folder = waiting.pop()
    try:
      status = os.stat(folder)
      entries = list(os.scandir(folder))
    except OSError:
      left_out['folders that cannot be read'] += 1
      continue
    if (status.st_dev, status.st_ino) in seen:
      left_out['links to folders read before'] += 1
      continue
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
      ending = os.path.splitext(entry.name)[1].lower()
      if entry.name.startswith('.') or entry.name == '__MACOSX':
        left_out['hidden'] += 1
      elif _is(entry.is_dir):
        waiting.append(entry.path)
      elif not _is(entry.is_file):
        left_out['broken links' if entry.is_symlink() else 'no files'] += 1
      elif ending in pixels.endings():
        yield entry.path
      else:
        left_out[ending or 'without an ending'] += 1


def _is(kind: Callable[[], bool]) -> bool:
  try:
    return kind()
  except OSError:  # a link that leads to itself
    return False


@functools.cache
def _say_once(path: str, line: str) -> None:
  if line:
    terminal.say(f'{path}: {line}')


def _folders(path: str, what: str) -> list[str]:
  try:
    found = sorted(
      entry.name
      for entry in os.scandir(path or '.')
      if _is(entry.is_dir) and not entry.name.startswith('.')
    )
  except OSError as error:
    raise UserError(f'config.data.data_dir: {error}') from error
  if not found:
    raise UserError(
      f'{path} holds no folders for {what}; expected <split>/<class>/*.jpg '
      'under config.data.data_dir'
    )
  if odd := [x for x in found if x != x.encode(errors='replace').decode()]:
    raise UserError(f'{path}: rename {odd[0]!r}: its name is not UTF-8')
  return found
