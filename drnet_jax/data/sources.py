# SPDX-License-Identifier: Apache-2.0
"""Data sets as random-access sources of encoded examples.

Three kinds, by `name`: a TFDS name; 'folder', images in `<split>/<class>/`; and
'packed', one .npz file of encoded images.
"""

import dataclasses
import functools
import importlib.resources
import sys
from collections.abc import Sequence
from typing import Any, Protocol, SupportsIndex

import tensorflow_datasets as tfds

from drnet_jax import terminal
from drnet_jax.data import folder, packed, text
from drnet_jax.data.shards import Shards, is_number
from drnet_jax.errors import UserError

# A list of classes that comes with us: the paper's 100 of ImageNet are not
# published. The sorted first hundred of
# numpy.random.default_rng(0).permutation(1000).
_LIST = 'imagenet100'


class Examples(Protocol):
  """Random access to encoded examples, safe from many threads."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: SupportsIndex) -> dict[str, Any]:
    """A dict with at least 'image' (the encoded file, or its path), 'label'.

    Raises:
      UnreadableImage: this one cannot be read.
    """

  def name(self, i: int) -> str:
    """Where an example lies, for messages."""


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set.

  Attributes:
    examples: the images.
    class_names: one for each class.
    unreadable: indices of the images found unreadable so far.
  """

  examples: Examples
  class_names: tuple[str, ...]
  unreadable: set[int] = dataclasses.field(default_factory=set)

  def note_unreadable(self, i: int, reason: str, most: int) -> None:
    """Reports an image that cannot be read, the first time it is met.

    Raises:
      UserError: these are more than `most`.
    """
    if i in self.unreadable:
      return
    self.unreadable.add(i)
    what = f'{self.examples.name(i)}: {reason}'
    if len(self.unreadable) > most:
      raise too_many_unreadable(what, most)
    terminal.say(
      f'warning: {what}. It is left out; {len(self.unreadable)} of at most '
      f'{most} unreadable images.'
    )


def too_many_unreadable(last: str, most: int) -> UserError:
  """The error that ends a run whose images cannot be read."""
  return UserError(
    f'{last}. There are more unreadable images than are allowed: '
    f'config.data.max_bad_images = {most}. Repair the data, or allow more.'
  )


def load(
  name: str,
  split: str,
  *,
  data_dir: str,
  classes: str = '',
  images_per_class: int = 0,
  keys: Sequence[str] = ('image', 'label'),
) -> Source:
  """Opens a split of a data set, preparing it where TFDS can.

  Reading never needs TensorFlow, for data sets of TFDS are ArrayRecord files
  read in place; to prepare some of them it has to be installed.

  Args:
    name: as in TFDS, for instance 'scaled_digits' or 'cifar10'; 'folder' or
      'packed'.
    split: as in TFDS, slices such as 'train[:90%]' too; of a folder, the name
      of a subfolder; of a packed file, 'train' or 'val', slices too.
    data_dir: where prepared TFDS data sets lie, '' for TFDS's own default; the
      folder that holds the splits; the packed file.
    classes: a file with the names of the classes to keep, one on each line, in
      label order, or 'imagenet100', a hundred of ImageNet's drawn by us; '' for
      all. Of TFDS only for labels without names, as these.
    images_per_class: keep so many of each class, drawn with a fixed seed; 0
      for all. Not for TFDS.
    keys: of TFDS's features that are image and label: classes, or integers from
      0. Without a list of classes the largest is looked up in all splits.

  Raises:
    UserError: unknown name or split, or a data set that cannot be prepared.
  """
  kept = read_classes(classes)
  if name == 'folder':
    return Source(*folder.load(data_dir, split, kept, images_per_class))
  if name == 'packed':
    return Source(*packed.load(data_dir, split, kept, images_per_class))
  builder = _tfds_builder(name, data_dir)
  names = _names_of(builder, keys)
  if (kept and names) or images_per_class:
    raise UserError(
      "config.data.classes and images_per_class need name = 'folder' or "
      f"'packed', not {name!r}"
    )
  _prepare(builder)
  names = names or kept or _numbers(name, data_dir, keys[1])
  try:
    return Source(Shards(builder, split, keys, len(names)), names)
  except ValueError as error:
    raise UserError(f'split {split!r} of {name!r}: {error}') from error


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
  try:
    if not sys.stderr.isatty():
      tfds.disable_progress_bar()
    builder.download_and_prepare()
  except (
    NotImplementedError,  # there are files that it reads with TensorFlow only
    AssertionError,  # downloads by hand are missing
    ImportError,  # to prepare this one takes TensorFlow
    OSError,
    tfds.core.download.DownloadError,
  ) as error:
    raise UserError(
      f'data set {builder.name!r} is not prepared as ArrayRecord in '
      f'{builder.data_path}, and cannot be from here: {error}. For ImageNet, '
      'or TFRecord files of any data set, see launch/prepare_imagenet.py; '
      'images in <split>/<class>/ can be used as they are: '
      'config.data.name=folder'
    ) from error


def class_names(
  name: str,
  split: str,
  *,
  data_dir: str,
  classes: str,
  keys: Sequence[str] = ('image', 'label'),
) -> tuple[str, ...]:
  """Names of the classes, in label order.

  A TFDS data set whose labels have names need not be prepared for that. Args
  and errors are those of `load`; only a folder's classes depend on the split.
  """
  if kept := read_classes(classes):
    return kept
  if name == 'folder':
    return folder.class_names(data_dir, split)
  if name == 'packed':
    return packed.class_names(data_dir)
  names = _names_of(_tfds_builder(name, data_dir), keys)
  return names or _numbers(name, data_dir, keys[1])


def _names_of(
  builder: tfds.core.DatasetBuilder, keys: Sequence[str]
) -> tuple[str, ...]:
  """Names of the classes; () where labels are integers.

  Raises:
    UserError: the features of these names are not an image and a label.
  """
  features = builder.info.features
  kinds = (
    ('an image', lambda x: isinstance(x, tfds.features.Image)),
    ('a class or an integer', lambda x: is_number(x, 'iu')),
  )
  for key, (what, fits) in zip(keys, kinds, strict=True):
    if key not in features or not fits(features[key]):
      fitting = [name for name in features if fits(features[name])]
      raise UserError(
        f'config.data.keys = {tuple(keys)}: {key!r} of the data set '
        f'{builder.name!r} is not {what}; of its features '
        f'{", ".join(fitting) or "none"} would be'
      )
  return tuple(getattr(features[keys[1]], 'names', None) or ())


@functools.cache
def _numbers(name: str, data_dir: str, key: str) -> tuple[str, ...]:
  """'0', '1', ... up to the largest integer that is a label."""
  builder = _tfds_builder(name, data_dir)
  _prepare(builder)
  largest = 0
  for split in builder.info.splits:
    labels = Shards(builder, split, ('', key), num_classes=None)
    found = (int(labels[i]['label']) for i in range(len(labels)))
    largest = max([largest, *found])
  return tuple(map(str, range(largest + 1)))


def _tfds_builder(name: str, data_dir: str):
  try:
    return tfds.builder(
      name, data_dir=data_dir or None, file_format='array_record'
    )
  except (
    tfds.core.DatasetNotFoundError,
    AssertionError,  # of a version
    ValueError,
    RuntimeError,
  ) as error:
    raise UserError(f'config.data.name = {name!r}: {error}') from error


def read_classes(name: str) -> tuple[str, ...]:
  """Names in a list of classes, see `load`; none for ''.

  Raises:
    UserError: it cannot be read, or names a class twice.
  """
  if not name:
    return ()
  path = name
  if name == _LIST:
    path = importlib.resources.files('drnet_jax.data') / f'{name}.txt'
  try:
    names = text.lines(path)
  except OSError as error:
    raise UserError(f'config.data.classes cannot be read: {error}') from error
  if len(set(names)) != len(names):
    raise UserError(f'{path} names a class twice')
  return names
