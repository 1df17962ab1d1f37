# SPDX-License-Identifier: Apache-2.0
"""Data sets packed into one .npz file of encoded images.

Its arrays: 'data' uint8, the files one after the other; 'offsets' [N + 1],
where each begins and the last ends; 'label' [N]; 'class_name' [K], text or
bytes, in label order; 'split' [N], 0 for train and 1 for val: without it, all
are val.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds

from drnet_jax.data import selection, text
from drnet_jax.errors import DAMAGED_ZIP, UserError

_SPLITS = ('train', 'val')
# Arrays that it must have, and of which of numpy's kinds.
_KINDS = {'data': 'u', 'offsets': 'iu', 'label': 'iu', 'class_name': 'SU'}


@dataclasses.dataclass(frozen=True)
class Packed:
  """All images of a packed file, `data` and `offsets` as it holds them.

  The labels are a model's; -1 of classes that are left out.
  """

  path: str
  data: np.ndarray
  offsets: np.ndarray
  label: np.ndarray

  def __len__(self) -> int:
    return len(self.label)

  def __getitem__(self, i: SupportsIndex) -> dict[str, Any]:
    encoded = self.data[self.offsets[i] : self.offsets[i + 1]]
    return {'image': encoded.tobytes(), 'label': int(self.label[i])}

  def name(self, i: int) -> str:
    return f'{self.path}, image {i}'


def load(
  path: str, split: str, kept: Sequence[str], images_per_class: int
) -> tuple[selection.Some, tuple[str, ...]]:
  """Returns the examples of a split and the names of its classes.

  Args are those of `sources.load`: `path` is its `data_dir`, `kept` the names
  that its `classes` lists.

  Raises:
    UserError: the file cannot be read, or the split holds nothing.
  """
  file = _read(path)
  _check(file, path)
  found = _names(file)
  names, indices = selection.classes(found, kept, path)
  rows = _rows_of_split(file, split, path)
  # From the file's labels to ours; -1 for classes left out.
  ours = np.full(len(found), -1)
  ours[indices] = np.arange(len(names))
  label = ours[file['label']]
  chosen = []
  for j in range(len(names)):
    of_class = np.flatnonzero(label[rows] == j)
    drawn = selection.drawn(len(of_class), images_per_class, j)
    chosen.append(of_class[drawn])
  rows = rows[np.sort(np.concatenate(chosen))]
  if not len(rows):
    raise UserError(f'split {split!r} of {path} holds no image')
  whole = Packed(path, file['data'], file['offsets'], label)
  return selection.Some(whole, rows), names


def class_names(path: str) -> tuple[str, ...]:
  """Names of the classes."""
  return _names(_read(path, ['class_name']))


def _read(path: str, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
  """Its arrays, or some of them."""
  try:
    with np.load(path, allow_pickle=False) as file:
      if missing := sorted(_KINDS.keys() - {*file}):
        raise UserError(f'packed file {path} lacks {", ".join(missing)}')
      arrays = {name: file[name] for name in only or file}
  except OSError as error:
    raise UserError(f'config.data.data_dir: {error}') from error
  except DAMAGED_ZIP as error:
    raise UserError(
      f'config.data.data_dir = {path!r} is damaged, or no packed file: {error}'
    ) from error
  for name, kinds in _KINDS.items():
    x = arrays.get(name)
    if x is not None and (x.ndim != 1 or x.dtype.kind not in kinds):
      shape = ' x '.join(map(str, x.shape))
      raise UserError(f'packed file {path}: {name} holds {shape} of {x.dtype}')
  return arrays


def _check(file: Mapping[str, np.ndarray], path: str) -> None:
  """Raises UserError if the arrays do not fit each other."""
  label, offsets = file['label'], file['offsets']
  count, classes = len(label), len(file['class_name'])
  wrong = ''
  if not classes:
    wrong = 'class_name is empty'
  elif not len(file.get('split', label)) == count == len(offsets) - 1:
    wrong = (
      f'{count} labels need as many splits and one offset more, not '
      f'{len(offsets)}'
    )
  elif (np.diff(offsets.astype(np.int64)) < 0).any() or not (
    0 <= offsets[0] and offsets[-1] <= len(file['data'])
  ):
    wrong = 'offsets do not ascend within data'
  elif count and not 0 <= label.min() <= label.max() < classes:
    wrong = f'labels from {label.min()} to {label.max()}, for {classes} classes'
  if wrong:
    raise UserError(f'packed file {path}: {wrong}')


def _names(file: Mapping[str, np.ndarray]) -> tuple[str, ...]:
  return tuple(
    text.decoded(name) if isinstance(name, bytes) else str(name)
    for name in file['class_name'].tolist()
  )


def _rows_of_split(
  file: Mapping[str, np.ndarray], spec: str, path: str
) -> np.ndarray:
  of_image = file.get('split', np.ones(len(file['label'])))
  splits = {k: np.flatnonzero(of_image == i) for i, k in enumerate(_SPLITS)}
  infos = tfds.core.splits.SplitDict(
    tfds.core.SplitInfo(name=name, shard_lengths=[len(rows)], num_bytes=0)
    for name, rows in splits.items()
  )
  try:
    parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
  # The second is what TFDS says of 'all[...]', a name it keeps to itself.
  except (ValueError, NotImplementedError) as error:
    raise UserError(
      f'split {spec!r} of {path}: {error}; there are {", ".join(splits)}'
    ) from error
  return np.concatenate([splits[p.splitname][p.from_ : p.to] for p in parts])
