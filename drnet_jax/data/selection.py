# SPDX-License-Identifier: Apache-2.0
"""Some classes or images of a data set, or those of two."""

import dataclasses
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from drnet_jax.errors import UserError


def classes(
  found: Sequence[str], kept: Sequence[str], where: str
) -> tuple[tuple[str, ...], np.ndarray]:
  """The names to use, in label order, and the index of each in `found`.

  Those that are `kept`; without any all that were found, which may repeat.

  Raises:
    UserError: a class to keep is not there once; `where` names the data set.
  """
  if not kept:
    return tuple(found), np.arange(len(found))
  if wrong := sorted(name for name in kept if found.count(name) != 1):
    raise UserError(
      f'{where} is missing, or has duplicates of: {", ".join(wrong)}'
    )
  return tuple(kept), np.array([found.index(name) for name in kept])


def drawn(count: int, wanted: int, seed: int, *, skip: int = 0) -> np.ndarray:
  """Indices of `wanted` of `count` images, ascending; all if `wanted` is 0.

  The same for the same seed, on any machine. None of those that are drawn with
  `wanted` = `skip`.
  """
  if not wanted or wanted >= count:
    return np.arange(count)
  order = np.random.default_rng(seed).permutation(count)
  return np.sort(order[skip : skip + wanted])


@dataclasses.dataclass(frozen=True)
class Some:
  """Some of a data set's examples, under labels of another order if given.

  Attributes:
    examples: all of them, see `sources.Examples`.
    rows: [N], the indices of these.
    labels: [K], for each label of theirs the new one; None leaves them.
  """

  examples: Any
  rows: Sequence[int]
  labels: Sequence[int] | None = None

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: SupportsIndex) -> dict[str, Any]:
    example = self.examples[int(self.rows[i])]
    if self.labels is not None:
      example = example | {'label': int(self.labels[example['label']])}
    return example

  def name(self, i: int) -> str:
    return self.examples.name(int(self.rows[i]))


@dataclasses.dataclass(frozen=True)
class Joined:
  """Two data sets' examples, one after the other; see `sources.Examples`."""

  first: Any
  second: Any

  def __len__(self) -> int:
    return len(self.first) + len(self.second)

  def __getitem__(self, i: SupportsIndex) -> dict[str, Any]:
    examples, j = self._place(i)
    return examples[j]

  def name(self, i: int) -> str:
    examples, j = self._place(i)
    return examples.name(j)

  def _place(self, i: SupportsIndex) -> tuple[Any, int]:
    i, count = int(i), len(self.first)
    return (self.first, i) if i < count else (self.second, i - count)
