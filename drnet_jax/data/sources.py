# SPDX-License-Identifier: Apache-2.0
"""Data sets as random-access sources of encoded examples."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from drnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set.

  Attributes:
    examples: `examples[i]` is a dict with at least 'image' (the encoded file)
      and 'label'; safe to read from many threads.
    class_names: one for each class.
  """

  examples: Sequence[dict[str, Any]]
  class_names: tuple[str, ...]


def load(name: str, split: str, *, data_dir: str) -> Source:
  """Opens a split of a TFDS data set, preparing it where that needs no more.

  Never imports TensorFlow: data sets are ArrayRecord files read in place.

  Args:
    name: as in TFDS, for instance 'scaled_digits' or 'cifar10'.
    split: as in TFDS; slices such as 'train[:90%]' too.
    data_dir: where prepared data sets lie; '' for TFDS's own default.

  Raises:
    UserError: unknown name or split, or a data set that cannot be prepared.
  """
  try:
    builder = tfds.builder(
      name, data_dir=data_dir or None, file_format='array_record'
    )
  except (tfds.core.DatasetNotFoundError, ValueError, RuntimeError) as error:
    raise UserError(f'config.data.name = {name!r}: {error}') from error
  try:
    if not sys.stderr.isatty():
      tfds.disable_progress_bar()
    builder.download_and_prepare()
    examples = builder.as_data_source(
      split=split, decoders={'image': tfds.decode.SkipDecoding()}
    )
  except NotImplementedError as error:
    raise UserError(
      f'data set {name!r} is not prepared as ArrayRecord in '
      f'{builder.data_path}: {error}'
    ) from error
  except ValueError as error:
    raise UserError(f'split {split!r} of {name!r}: {error}') from error
  return Source(examples, tuple(builder.info.features['label'].names))
