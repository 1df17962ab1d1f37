# SPDX-License-Identifier: Apache-2.0
"""What a classifier gives back for an image."""

import dataclasses
import os
from typing import Any

import numpy as np

from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.serve.schedule import Item


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


def prediction(
  contract: Contract, item: Item, probabilities: np.ndarray, top_k: int
) -> Prediction:
  """Puts what was found of an image that has left, [K], into words.

  Raises:
    UserError: the network returns NaN or infinity.
  """
  if not np.isfinite(probabilities).all():
    raise UserError('the network returns NaN or infinity')
  order = _best(probabilities, max(top_k, 1))
  classes, options = contract.class_names, contract.options
  costs, ran = contract.costs, [item.policy.path[i] for i in item.tried]
  gmacs = float(costs.of_path(options, ran)[0, -1])
  if item.policy.start is not None:
    gmacs += costs.predictor
  return Prediction(
    label=int(order[0]),
    name=classes[order[0]],
    probability=float(probabilities[order[0]]),
    top=tuple((classes[i], float(probabilities[i])) for i in order[:top_k]),
    probabilities=probabilities,
    option=options.names[ran[-1]],
    ran=tuple(options.names[j] for j in ran),
    size_px=contract.sizes_px[ran[-1]],
    gmacs=gmacs,
    full_gmacs=costs.full,
    hurried=item.hurried,
  )


def _best(probabilities: np.ndarray, count: int) -> np.ndarray:
  """The likeliest classes, best first; of equal ones the first."""
  found = np.arange(len(probabilities))
  if count < len(found):  # so that there are few to sort
    least = np.partition(probabilities, -count)[-count]
    found = np.flatnonzero(probabilities >= least)
  order = np.argsort(-probabilities[found], kind='stable')
  return found[order[:count]]


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
