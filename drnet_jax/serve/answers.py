# SPDX-License-Identifier: Apache-2.0
"""What a classifier gives back for an image."""

import dataclasses
import os
from collections.abc import Sequence
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
    option: at which the image left: '112 px', or 'exit 3'.
    ran: the options that the policy tried on it, in order.
    size_px: the side that the last network worked at.
    gmacs: cost, everything counted.
    full_gmacs: cost of the most expensive option alone.
    spilled: a stream ran it further along the path than the policy asked, to
      keep a deadline.
  """

  label: int
  name: str
  probability: float
  top: tuple[tuple[str, float], ...]
  probabilities: np.ndarray
  option: str
  ran: tuple[str, ...]
  size_px: int
  gmacs: float
  full_gmacs: float
  spilled: bool = False


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


def likeliest(
  probabilities: np.ndarray, class_names: Sequence[str], top_k: int
) -> dict[str, Any]:
  """A network's output in words: the fields of a `Prediction` on classes.

  Args:
    probabilities: [K].
    class_names: in label order.
    top_k: classes to list.

  Raises:
    UserError: the network returns NaN.
  """
  if not np.isfinite(probabilities).all():
    raise UserError('the network returns NaN or infinity')
  # Stable, so that the first of two equal classes wins everywhere.
  order = np.argsort(-probabilities, kind='stable')
  top = [(class_names[i], float(probabilities[i])) for i in order[:top_k]]
  return {
    'label': int(order[0]),
    'name': class_names[order[0]],
    'probability': float(probabilities[order[0]]),
    'top': tuple(top),
    'probabilities': probabilities,
  }


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
