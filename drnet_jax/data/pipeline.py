# SPDX-License-Identifier: Apache-2.0
"""Batches for training and evaluation, in an order that only the seed decides.

Grain's operators stand in the one order in which the position in the data is
the step number, whatever the number of processes and workers: shuffle, repeat,
augment, cut by process, batch, start at a step, and only then prefetch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from drnet_jax.data import scaled_digits, selection, sources, transforms
from drnet_jax.errors import UserError

Example = dict[str, Any]
HELD_OUT = 'held_out'


def _decoded(example: Example) -> Example:
  return example | {'image': transforms.decode(example['image'])}


def _crop_for_training(
  example: Example, rng: np.random.Generator, size_px: int
) -> Example:
  image = transforms.random_resized_crop(example['image'], size_px, rng)
  return example | {'image': image}


def _shift_for_training(
  example: Example, rng: np.random.Generator, size_px: int
) -> Example:
  image = transforms.random_shift(example['image'], size_px, rng)
  return example | {'image': image}


_AUGMENTATIONS: dict[str, Callable] = {
  'random_resized_crop': _crop_for_training,
  'random_shift': _shift_for_training,
  'compose_digits': scaled_digits.compose_example,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """`config.data`: a data set and how it becomes batches.

  Attributes:
    name: of the data set, see `sources.load`.
    data_dir: where prepared data sets lie; '' for TFDS's default.
    train_split: to learn from.
    validation_split: watched during training.
    test_split: for the report, and for nothing else.
    epoch_images: images in one epoch; 0 for the length of the split.
    augmentation: 'random_resized_crop'; 'random_shift', CIFAR's; or
      'compose_digits' (for the split 'originals' of scaled_digits).
    flip: share of the training images that are mirrored left to right.
    resize_px: side before evaluation's central crop; 0 for the crop's.
    keep_aspect: it is the short side; False squashes the image to a square.
    classes: list of the classes to keep, see `sources.load`.
    images_per_class: training images to keep of each, see `sources.load`.
    threads: that read and decode ahead.
    held_out: images of the training split that are set aside, drawn with a
      fixed seed; they are the split 'held_out'.
  """

  name: str
  data_dir: str
  train_split: str
  validation_split: str
  test_split: str
  epoch_images: int
  augmentation: str
  flip: float
  resize_px: int
  keep_aspect: bool
  classes: str
  images_per_class: int
  threads: int
  held_out: int = 0  # runs begun before there was this field have none

  def __post_init__(self):
    if self.augmentation not in _AUGMENTATIONS:
      raise UserError(
        f'config.data.augmentation = {self.augmentation!r} is not one of '
        f'{sorted(_AUGMENTATIONS)}'
      )
    if self.augmentation == 'compose_digits' and self.name != 'scaled_digits':
      raise UserError(
        "config.data.augmentation = 'compose_digits' is for scaled_digits; for "
        f"{self.name!r} set it to 'random_resized_crop'"
      )
    if not 0 <= self.flip <= 1:
      raise UserError(f'config.data.flip = {self.flip} is no share of images')
    for field in (
      'epoch_images',
      'resize_px',
      'images_per_class',
      'threads',
      'held_out',
    ):
      if getattr(self, field) < 0:
        raise UserError(
          f'config.data.{field} = {getattr(self, field)} is negative'
        )

  def open(self, split: str) -> sources.Source:
    """Opens one of the splits, preparing the data set if it can."""
    is_train = split in (self.train_split, HELD_OUT)
    source = sources.load(
      self.name,
      self.train_split if is_train else split,
      data_dir=self.data_dir,
      classes=self.classes,
      images_per_class=self.images_per_class if is_train else 0,
    )
    ours, theirs = self.class_names(), source.class_names
    if ours != theirs:
      raise UserError(
        f'split {split!r} of {self.data_dir} has other classes than '
        f'{self.train_split!r}: {sorted(set(theirs) - set(ours))} more, '
        f'{sorted(set(ours) - set(theirs))} missing'
      )
    if is_train and (self.held_out or split == HELD_OUT):
      count = len(source.examples)
      aside = selection.drawn(count, self.held_out, seed=0)
      if not 0 < self.held_out < count:
        raise UserError(
          f'config.data.held_out = {self.held_out} of {count} images of '
          f'{self.train_split!r} leaves none to learn from, or none aside'
        )
      rows = aside
      if split != HELD_OUT:
        rows = np.setdiff1d(np.arange(count), aside)
      source = dataclasses.replace(
        source, examples=selection.Some(source.examples, rows)
      )
    return source

  def class_names(self) -> tuple[str, ...]:
    """In label order; does not read images."""
    return sources.class_names(
      self.name,
      self.train_split,
      data_dir=self.data_dir,
      classes=self.classes,
    )

  def steps_per_epoch(self, source: sources.Source, batch_size: int) -> int:
    """Whole batches in one epoch, at least one."""
    images = self.epoch_images or len(source.examples)
    return max(images // batch_size, 1)

  def train_batches(
    self,
    source: sources.Source,
    *,
    size_px: int,
    batch_size: int,
    seed: int,
    start_step: int,
    process: int = 0,
    num_processes: int = 1,
  ) -> Iterator[Example]:
    """Endless batches of this process's part of each global batch.

    Args:
      source: the training split.
      size_px: side of the images.
      batch_size: global.
      seed: decides order and augmentation.
      start_step: batches to skip, at no cost.
      process: index of this process.
      num_processes: processes that share the batch.

    Returns:
      'image' uint8 [B / num_processes, size_px, size_px, 3], 'label' and the
      other fields of the source.
    """
    augmentation = _AUGMENTATIONS[self.augmentation]

    def augment(example: Example, rng: np.random.Generator) -> Example:
      example = augmentation(_decoded(example), rng, size_px)
      if rng.random() < self.flip:
        example['image'] = example['image'][:, ::-1]
      return example

    data = grain.MapDataset.source(source.examples).seed(seed).shuffle()
    data = data.repeat().random_map(augment)[process::num_processes]
    data = data.batch(batch_size // num_processes)[start_step:]
    return iter(data.to_iter_dataset(self._read_options()))

  def eval_batches(
    self, source: sources.Source, *, size_px: int, batch_size: int
  ) -> Iterator[Example]:
    """Every example once, in order; the last batch is padded.

    Args:
      source: the split.
      size_px: side of the images.
      batch_size: of every batch.

    Yields:
      As `train_batches`, and 'valid' bool [B], False on padding.
    """

    def prepare(example: Example) -> Example:
      return example | {'image': self.eval_image(example['image'], size_px)}

    data = grain.MapDataset.source(source.examples).map(prepare)
    data = data.batch(batch_size, drop_remainder=False)
    for batch in data.to_iter_dataset(self._read_options()):
      count = len(batch['label'])
      batch['valid'] = np.ones(count, bool)
      yield {
        name: np.pad(x, [(0, batch_size - count)] + [(0, 0)] * (x.ndim - 1))
        for name, x in batch.items()
      }

  def eval_image(self, encoded: bytes | str, size_px: int) -> np.ndarray:
    """Reads an image file as evaluation shows it, uint8 [size_px]*2 + [3].

    Raises:
      UserError: it cannot be read.
    """
    if 0 < self.resize_px < size_px:
      raise UserError(
        f'config.data.resize_px = {self.resize_px} is less than '
        f'config.model.image_px = {size_px}'
      )
    return transforms.center_crop(
      transforms.decode(encoded),
      size_px,
      resize_px=self.resize_px or size_px,
      keep_aspect=self.keep_aspect,
    )

  def _read_options(self) -> grain.ReadOptions:
    # Few threads: a decoding thread holds Python's lock much of the time.
    return grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=4)
