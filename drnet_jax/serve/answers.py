# SPDX-License-Identifier: Apache-2.0
"""What a classifier gives back for an image."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from drnet_jax.choosing.policy import Policy
from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.serve.schedule import Item

_FEW = 10  # classes, up to which looking for each is faster than sorting all


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a model says of an image."""

  label: int  # of the likeliest class, as are the next two
  name: str
  probability: float
  top: tuple[tuple[str, float], ...]  # names and probabilities, best first
  probabilities: np.ndarray  # float32 [K], of all classes
  option: str  # at which the image left: '112 px', or 'exit 3'
  ran: tuple[str, ...]  # the options that the policy tried on it, in order
  size_px: int  # the side that the last network worked at
  gmacs: float  # cost, everything counted
  full_gmacs: float  # cost of the most expensive option alone
  # A stream's deadline left no time for where the policy sent it next.
  hurried: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
  """An image that could not be read."""

  index: int  # its place in the call
  source: str  # its path, or 'image <index>'
  reason: str  # why, with the source named


def predictions(
  contract: Contract,
  items: Sequence[Item],
  probabilities: np.ndarray,
  top_k: int,
) -> list[Prediction]:
  """Puts what was found of images that have left, [N, K], into words.

  Raises:
    UserError: the network returns NaN or infinity.
  """
  if not np.isfinite(probabilities).all():
    raise UserError('the network returns NaN or infinity')
  order = _best(probabilities, max(top_k, 1))
  best = np.take_along_axis(probabilities, order, 1).tolist()
  names = contract.class_names
  of_path = functools.cache(functools.partial(_of_path, contract))
  return [
    Prediction(
      label=classes[0],
      name=names[classes[0]],
      probability=values[0],
      top=tuple((names[i], p) for i, p in zip(classes, values, strict=True))[
        :top_k
      ],
      probabilities=row,
      hurried=item.hurried,
      **of_path(item.policy, tuple(item.tried)),
    )
    for item, row, classes, values in zip(
      items, probabilities, order.tolist(), best, strict=True
    )
  ]


def _of_path(
  contract: Contract, policy: Policy, tried: tuple[int, ...]
) -> dict[str, Any]:
  """The fields of a prediction that only its way decides."""
  options, costs = contract.options, contract.costs
  ran = [policy.path[i] for i in tried]
  gmacs = float(costs.of_path(options, ran)[0, -1])
  if policy.start is not None:
    gmacs += costs.predictor
  return {
    'option': options.names[ran[-1]],
    'ran': tuple(options.names[j] for j in ran),
    'size_px': contract.sizes_px[ran[-1]],
    'gmacs': gmacs,
    'full_gmacs': costs.full,
  }


def _best(probabilities: np.ndarray, count: int) -> np.ndarray:
  """The likeliest classes of each row, best first; of equal ones the first."""
  if count > _FEW:
    return np.argsort(-probabilities, axis=1, kind='stable')[:, :count]
  rest, rows = probabilities.copy(), np.arange(len(probabilities))
  order = np.empty((len(rows), min(count, rest.shape[1])), int)
  for place in range(order.shape[1]):
    order[:, place] = rest.argmax(1)
    rest[rows, order[:, place]] = -np.inf
  return order


def failure(index: int, source: Any, error: Exception) -> Failure:
  """Names an image and what is wrong with it."""
  named = isinstance(source, str | os.PathLike)
  name = os.fspath(source) if named else f'image {index}'
  reason = str(error)
  if not isinstance(error, UserError):
    reason = f'cannot read {name} as an image: {type(error).__name__}: {error}'
  elif name not in reason:
    reason = f'{name}: {reason}'
  return Failure(index, name, reason)
