# SPDX-License-Identifier: Apache-2.0
"""Batches for training and evaluation, in an order that only the seed decides.

Grain's operators stand in the one order in which the position in the data is
the step number, whatever the number of processes and workers: shuffle, repeat,
augment, batch, cut by process, start at a step, and only then prefetch. Each
process has a run of neighbours of the global batch, so that images lie in it in
one order on any number of processes.
"""

import collections
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import grain
import numpy as np

from drnet_jax import settings
from drnet_jax.data import (
  classes,
  folder,
  pixels,
  rand_augment,
  random_crop,
  scaled_digits,
  selection,
  sources,
  transforms,
)
from drnet_jax.data.pixels import UnreadableImage
from drnet_jax.errors import UserError

Example = dict[str, Any]
# Splits of training images that are not learned from: for policies and, where
# the test split is called so, as many to test on.
HELD_OUT = 'held_out'
TESTED = 'held_out_test'
ASIDE = HELD_OUT, TESTED

_BUFFERED = 4  # batches ahead, of each process that makes them
_SEPARATOR = '\0'  # of the reasons of several unreadable images, in one text


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
    least_epoch_images: in that case an epoch has at least so many, some images
      more than once: a few steps teach little.
    augmentation: 'random_resized_crop'; 'random_shift', CIFAR's; or
      'compose_digits' (for the split 'originals' of scaled_digits).
    least_crop: share of an image's area that random_resized_crop keeps at
      least.
    flip, mixup, cutmix: see `steps.augment.BatchAugmentation`.
    rand_augment: () for none, or (operations, magnitude from 0 to 30), for
      instance (2, 9); see `rand_augment.apply`.
    resize_px: side before evaluation's central crop; 0 for the crop's.
    keep_aspect: it is the short side; False squashes the image to a square.
    classes: list of the classes to keep, see `sources.load`.
    class_map: file that says what the model calls classes of the data, see
      `classes.read_map`; '' where names are the same.
    images_per_class: training images to keep of each, see `sources.load`.
    unlabelled: a folder of images that are trained on as well, without a class:
      a teacher says what they show, see `steps.pretrain`; '' for none.
    held_out: images of the training split that are set aside, drawn with a
      fixed seed; they are the split 'held_out'. Below 1 it is a share of them.
    max_bad_images: unreadable images to tolerate, in each split and process;
      one more ends the run.
    max_pixels: the most that an image may have, see `pixels.opened`; 0 for the
      usual.
    keys: of TFDS's features, those with the image and with its label.
    threads: that read and decode ahead, in each process that does.
    workers: processes that read and decode ahead; 0 for threads of this one.
  """

  name: str
  data_dir: settings.Path
  train_split: str
  validation_split: str
  test_split: str
  epoch_images: settings.Whole
  least_epoch_images: settings.Whole
  augmentation: Literal['random_resized_crop', 'random_shift', 'compose_digits']
  least_crop: Annotated[float, settings.In('(0, 1]')]
  flip: settings.Share
  mixup: settings.NotNegative
  cutmix: settings.NotNegative
  rand_augment: (
    tuple[()]
    | tuple[
      Annotated[int, settings.In('[1, 100]')],
      Annotated[int, settings.In('[0, 30]')],
    ]
  )
  resize_px: settings.Whole
  keep_aspect: bool
  classes: settings.Path
  images_per_class: settings.Whole
  unlabelled: settings.Path
  held_out: settings.NotNegative
  max_bad_images: settings.Whole
  max_pixels: settings.Whole
  keys: tuple[str, str]
  threads: Annotated[int, settings.In('[0, 1024]')]
  workers: Annotated[int, settings.In('[0, 1024]')]
  class_map: settings.Path

  def __post_init__(self):
    if self.augmentation == 'compose_digits' and self.name != 'scaled_digits':
      raise UserError(
        "config.data.augmentation = 'compose_digits' is for scaled_digits; for "
        f"{self.name!r} set it to 'random_resized_crop'"
      )

  def open(self, split: str, class_names: Sequence[str] = ()) -> sources.Source:
    """Opens one of the splits, preparing the data set if it can.

    Args:
      split: one of this data's.
      class_names: of the model that is to see it; without, those of the
        training split, which is then needed too.

    Raises:
      UserError: it cannot be opened, or its classes are not the model's.
    """
    is_train = split in (self.train_split, *ASIDE)
    source = sources.load(
      self.name,
      self.train_split if is_train else split,
      data_dir=self.data_dir,
      classes=self.classes,
      images_per_class=self.images_per_class if is_train else 0,
      keys=self.keys,
    )
    source = classes.matched(
      source,
      class_names or self.class_names(),
      classes.read_map(self.class_map),
      f'split {split!r} of {self.data_dir or self.name}',
    )
    if is_train and (self.held_out or split in ASIDE):
      count = len(source.examples)
      wanted = round(self.held_out * (1 if self.held_out >= 1 else count))
      used = split, self.test_split, self.validation_split
      aside = wanted * (2 if TESTED in used else 1)
      if not 0 < aside < count:
        raise UserError(
          f'config.data.held_out = {self.held_out:g} of {count} images of '
          f'{self.train_split!r} leaves none to learn from, or none aside'
        )
      if split == HELD_OUT:
        rows = selection.drawn(count, wanted, seed=0)
      elif split == TESTED:
        rows = selection.drawn(count, wanted, seed=0, skip=wanted)
      else:
        rows = selection.drawn(count, count - aside, seed=0, skip=aside)
      examples = selection.Some(source.examples, rows)
      source = dataclasses.replace(source, examples=examples)
    return source

  def with_unlabelled(self, source: sources.Source) -> sources.Source:
    """The training split and, labelled -1, the images without a class.

    Raises:
      UserError: there are none, or they cannot stand beside the data set's.
    """
    if not self.unlabelled:
      return source
    field = f'config.data.unlabelled = {self.unlabelled!r}'
    if self.name not in ('folder', 'packed'):
      raise UserError(
        f"{field} needs name = 'folder' or 'packed', not {self.name!r}"
      )
    left_out: collections.Counter[str] = collections.Counter()
    paths = folder.images(self.unlabelled, left_out)
    if not paths:
      said, others = f'{field} holds no image', folder.describe(left_out)
      raise UserError(f'{said}; {others}' if others else said)
    more = folder.Files(tuple(paths), (-1,) * len(paths))
    examples = selection.Joined(source.examples, more)
    return dataclasses.replace(source, examples=examples)

  def class_names(self) -> tuple[str, ...]:
    """In label order, of the training split; does not read images."""
    found = sources.class_names(
      self.name,
      self.train_split,
      data_dir=self.data_dir,
      classes=self.classes,
      keys=self.keys,
    )
    if renames := classes.read_map(self.class_map):
      found = tuple(dict.fromkeys(renames.get(name, name) for name in found))
    return found

  def steps_per_epoch(self, source: sources.Source, batch_size: int) -> int:
    """Full batches in one epoch, at least one."""
    images = max(len(source.examples), self.least_epoch_images)
    return max((self.epoch_images or images) // batch_size, 1)

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
      process, num_processes: the place of this process among those that share
        the batch.

    Returns:
      'image' uint8 [B / num_processes, size_px, size_px, 3], 'label' and the
      other fields of the source. In place of an image that cannot be read
      stands the next of the source that can.

    Raises:
      UserError: more than `max_bad_images` cannot be read.
    """
    examples = source.examples

    def prepare(i: int, rng: np.random.Generator) -> Example:
      return self._first_readable(
        examples, i, lambda example: self._augmented(example, rng, size_px)
      )

    data = grain.MapDataset.range(len(examples)).seed(seed).shuffle()
    data = data.repeat().random_map(prepare)
    data = data.batch(batch_size // num_processes, batch_fn=_stack)
    return self._read(data[process::num_processes][start_step:], source)

  def _augmented(
    self, example: Example, rng: np.random.Generator, size_px: int
  ) -> Example:
    """A training example: read, cut or composed, and RandAugment."""
    encoded, limit = example['image'], self.max_pixels
    if self.augmentation == 'random_resized_crop':
      image = random_crop.random_resized_crop(
        encoded, size_px, rng, least=self.least_crop, max_pixels=limit
      )
      example = example | {'image': image}
    elif self.augmentation == 'random_shift':
      image = pixels.decode(encoded, max_pixels=limit)
      image = transforms.random_shift(image, size_px, rng)
      example = example | {'image': image}
    else:
      example = scaled_digits.compose_example(example, rng, size_px)
    if self.rand_augment:
      image = rand_augment.apply(example['image'], rng, *self.rand_augment)
      example['image'] = image
    return example

  def eval_batches(
    self,
    source: sources.Source,
    *,
    size_px: int,
    batch_size: int,
    process: int = 0,
    num_processes: int = 1,
  ) -> Iterator[Example]:
    """Every example once, in order; as many batches on every process.

    Args are those of `train_batches`, of any split.

    Returns:
      As `train_batches`, and 'index' int [B / num_processes], the example's in
      the split, -1 on padding; 'valid' bool, False on padding and on images
      that cannot be read.

    Raises:
      UserError: more than `max_bad_images` cannot be read.
    """
    examples, blank = source.examples, {}

    def show(example: Example) -> Example:
      return example | {'image': self.eval_image(example['image'], size_px)}

    def prepare(i: int) -> Example:
      index = i if i < len(examples) else -1
      found = {'index': index, 'valid': True, 'first': i, 'unreadable': ''}
      try:
        if index >= 0:
          return show(examples[i]) | found
      except UnreadableImage as error:
        found['unreadable'] = str(error)
      if not blank:
        whole = self._first_readable(examples, 0, show)
        # In one call: other threads read it.
        blank.update({k: np.zeros_like(v) for k, v in whole.items()})
      return blank | found | {'valid': False}

    padded = math.ceil(len(examples) / batch_size) * batch_size
    data = grain.MapDataset.range(padded).map(prepare)
    data = data.batch(batch_size // num_processes, batch_fn=_stack)
    return self._read(data[process::num_processes], source)

  def check_side(self, size_px: int) -> None:
    """Raises UserError unless crops of this side can be cut in evaluation."""
    if 0 < self.resize_px < size_px:
      raise UserError(
        f'config.data.resize_px = {self.resize_px} is less than '
        f'config.model.image_px = {size_px}'
      )

  def eval_image(self, encoded: bytes | str, size_px: int) -> np.ndarray:
    """Reads an image file as evaluation shows it, uint8 [size_px]*2 + [3].

    Raises:
      UserError: it cannot be read.
    """
    self.check_side(size_px)
    return transforms.center_crop(
      pixels.decode(encoded, max_pixels=self.max_pixels),
      size_px,
      resize_px=self.resize_px or size_px,
      keep_aspect=self.keep_aspect,
    )

  def _read(
    self, data: grain.MapDataset, source: sources.Source
  ) -> Iterator[Example]:
    """Makes batches ahead, in threads or in worker processes.

    The source takes note of what could not be read, see `_first_readable`.
    """
    options = grain.ReadOptions(
      num_threads=self.threads, prefetch_buffer_size=_BUFFERED
    )
    stream = data.to_iter_dataset(options)
    if self.workers:
      stream = stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self.workers),
        worker_init_fn=_leave_signals_to_parent,
      )
    batches = iter(stream)
    try:
      for batch in batches:
        first, unreadable = batch.pop('first'), batch.pop('unreadable')
        for row in np.flatnonzero(unreadable != ''):
          for k, reason in enumerate(unreadable[row].split(_SEPARATOR)):
            i = (first[row] + k) % len(source.examples)
            source.note_unreadable(i, reason, self.max_bad_images)
        yield batch
    finally:
      batches.close()  # of workers, and of the memory shared with them

  def _first_readable(
    self,
    examples: sources.Examples,
    i: int,
    prepare: Callable[[Example], Example],
  ) -> Example:
    """`prepare` of example i, or of the next that can be read.

    Two fields are added: 'first', which is i, and 'unreadable', the reasons why
    those from there on cannot be read.
    """
    reasons = []
    while len(reasons) <= self.max_bad_images:
      j = (i + len(reasons)) % len(examples)
      if len(reasons) == len(examples):
        raise UserError(
          f'{examples.name(j)}: {reasons[0]}. None of the {len(examples)} '
          'images can be read'
        )
      try:
        found = {'first': i, 'unreadable': _SEPARATOR.join(reasons)}
        return prepare(examples[j]) | found
      except UnreadableImage as error:
        reasons.append(str(error))
    raise sources.too_many_unreadable(
      f'{examples.name(j)}: {reasons[-1]}', self.max_bad_images
    )


def _leave_signals_to_parent(*unused: int) -> None:
  """Ctrl-C and a scheduler's SIGTERM go to all processes; one is to save."""
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)


def _stack(examples: Sequence[Example]) -> Example:
  """Of each field an array; three times as fast as Grain's own on numbers."""
  fields = {name: [e[name] for e in examples] for name in examples[0]}
  images = np.stack(fields.pop('image'))
  return {k: np.asarray(v) for k, v in fields.items()} | {'image': images}
