# SPDX-License-Identifier: Apache-2.0
"""What a classifier gives back for an image."""

import dataclasses
import os
from typing import Any

import numpy as np

from drnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a model says of an image.

  Attributes:
    label: index of the likeliest class.
    name: of that class.
    probability: of that class.
    top: (name, probability) of the likeliest classes, best first.
    probabilities: float32 [K], of all classes.
    size_px: size the image was run at.
    chosen_px: size that was chosen; a stream may run an image larger.
    gmacs: cost, predictor counted.
    full_gmacs: cost of the base network alone at the largest size.
  """

  label: int
  name: str
  probability: float
  top: tuple[tuple[str, float], ...]
  probabilities: np.ndarray
  size_px: int
  chosen_px: int
  gmacs: float
  full_gmacs: float


@dataclasses.dataclass(frozen=True)
class Failure:
  """An image that could not be read.

  Attributes:
    index: its place in the call.
    source: its path, or 'image <index>'.
    reason: why, with the source named.
  """

  index: int
  source: str
  reason: str


def failure(index: int, source: Any, error: Exception) -> Failure:
  """Names an image and what is wrong with it."""
  if isinstance(source, str | os.PathLike):
    name = os.fspath(source)
  else:
    name = f'image {index}'
  reason = str(error)
  if not isinstance(error, UserError):
    reason = f'cannot read {name} as an image: {type(error).__name__}: {error}'
  elif name not in reason:
    reason = f'{name}: {reason}'
  return Failure(index, name, reason)
