# SPDX-License-Identifier: Apache-2.0
"""Splits of TFDS data sets, read in place from their ArrayRecord shards."""

import bisect
import concurrent.futures
import itertools
import os
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from drnet_jax.data.pixels import UnreadableImage
from drnet_jax.errors import UserError

_KEPT_BYTES = 2**25  # of a split's shards, up to which its examples are kept
_THREADS = 16  # that open shards; they may lie on a remote disk


class Shards:
  """Examples of a split: {'image': the encoded file, 'label': index, ...}.

  Of the other features those that are one number are there, too.

  Args:
    builder: of a data set that is prepared.
    split: as in TFDS, slices too.
    keys: of the features that are image and label; the first may be '', for
      labels alone.
    num_classes: above all labels; None for not known yet.

  Raises:
    UserError: a shard cannot be read, or is not the one that was prepared.
  """

  def __init__(
    self,
    builder: tfds.core.DatasetBuilder,
    split: str,
    keys: Sequence[str],
    num_classes: int | None,
  ):
    self._image, self._label = keys
    self._num_classes = num_classes
    self._features = tfds.features.FeaturesDict(
      {
        name: feature
        for name, feature in builder.info.features.items()
        if name in keys or (self._image and is_number(feature))
      }
    )
    self._examples = builder.as_data_source(
      split=split,
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )
    self._parts = builder.info.splits[split].file_instructions
    self._ends = list(itertools.accumulate(part.take for part in self._parts))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(_check, self._parts))  # raises what they raise
    # Of a small split, so that it is read once and not in every epoch.
    self._kept: dict[int, dict[str, Any]] | None = None
    files = {os.fspath(part.filename) for part in self._parts}
    sizes = itertools.accumulate(epath.Path(x).stat().length for x in files)
    # Of a large one, whose shards may be remote, no more than a few are asked.
    if all(size <= _KEPT_BYTES for size in sizes):
      self._kept = {}

  def keep_nothing(self) -> None:
    """Has every example read from its shard each time, as of a large split."""
    self._kept = None

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, i: SupportsIndex) -> dict[str, Any]:
    if self._kept is None:
      return self._read(i)
    at = range(len(self))[i]
    if at not in self._kept:
      self._kept[at] = self._read(at)
    return self._kept[at].copy()

  def _read(self, i: SupportsIndex) -> dict[str, Any]:
    try:
      record = self._examples[i]
    except RuntimeError as error:  # what the reader raises for damaged data
      raise UnreadableImage(f'cannot read the record: {error}') from error
    decoders = {self._image: tfds.decode.SkipDecoding()} if self._image else {}
    example = self._features.deserialize_example_np(record, decoders=decoders)
    label = example.pop(self._label)
    if self._num_classes and not 0 <= label < self._num_classes:
      raise UserError(
        f'label {label} of {self.name(i)} is none of the '
        f'{self._num_classes} classes; see config.data.keys'
      )
    image = example.pop(self._image, b'')
    return example | {'image': image, 'label': label}

  def name(self, i: int) -> str:
    """Where an example lies: file and record."""
    part = bisect.bisect_right(self._ends, i)
    begin = self._ends[part] - self._parts[part].take
    record = i - begin + self._parts[part].skip
    return f'{os.fspath(self._parts[part].filename)}, record {record}'


def is_number(
  feature: tfds.features.FeatureConnector, kinds: str = 'iuf'
) -> bool:
  """Whether a feature is one number, of these kinds, for each example."""
  return feature.shape == () and np.dtype(feature.np_dtype).kind in kinds


def _check(part) -> None:
  path, count = os.fspath(part.filename), part.examples_in_shard
  try:
    reader = array_record_module.ArrayRecordReader(path)
    found = reader.num_records()
    reader.close()
  except RuntimeError as error:
    raise UserError(
      f'shard {path} cannot be read: {error}. Copy or prepare it again.'
    ) from error
  if found != count:
    raise UserError(
      f'shard {path} holds {found} records, not {count} as prepared. Copy or '
      'prepare it again.'
    )
