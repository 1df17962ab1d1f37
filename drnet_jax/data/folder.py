# SPDX-License-Identifier: Apache-2.0
"""Data sets that are folders of images, `<root>/<split>/<class>/*.jpg`."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, SupportsIndex

from PIL import Image

from drnet_jax.data import selection
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

  Args:
    root: the folder that holds the splits.
    split: name of a subfolder.
    kept: classes to keep, in label order; none for all.
    images_per_class: see `selection.drawn`.

  Raises:
    UserError: a folder is missing, or holds no image.
  """
  splits = _folders(root, 'splits')
  if split not in splits:
    raise UserError(f'{root} has no split {split!r}, only {", ".join(splits)}')
  path = os.path.join(root, split)
  names, _ = selection.classes(_folders(path, 'classes'), kept, path)
  endings = tuple(Image.registered_extensions())
  paths, labels = [], []
  for label, name in enumerate(names):
    files = sorted(
      entry.path
      for entry in os.scandir(os.path.join(path, name))
      if entry.name.lower().endswith(endings)
    )
    if not files:
      raise UserError(f'{os.path.join(path, name)} holds no image')
    for i in selection.drawn(len(files), images_per_class, label):
      paths.append(files[i])
      labels.append(label)
  return Files(tuple(paths), tuple(labels)), names


def class_names(root: str, split: str) -> tuple[str, ...]:
  """Names of the classes of a split."""
  return tuple(_folders(os.path.join(root, split), 'classes'))


def _folders(path: str, what: str) -> list[str]:
  try:
    found = sorted(
      entry.name
      for entry in os.scandir(path or '.')
      if entry.is_dir() and not entry.name.startswith('.')
    )
  except OSError as error:
    raise UserError(f'config.data.data_dir: {error}') from error
  if not found:
    raise UserError(
      f'{path} holds no folders for {what}; expected <split>/<class>/*.jpg '
      'under config.data.data_dir'
    )
  return found
