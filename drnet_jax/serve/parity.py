# SPDX-License-Identifier: Apache-2.0
"""How far two paths of one model are apart."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from drnet_jax.errors import UserError
from drnet_jax.serve.answers import Failure
from drnet_jax.serve.choice import TOLERANCE
from drnet_jax.serve.classifier import Classifier

# Where a choice hangs on less than this, rounding decides it.
_TIE = 1e-4


@dataclasses.dataclass(frozen=True)
class Parity:
  """How two paths answer the same images."""

  runtime: str  # of the second
  images: int  # compared
  ties: int  # ran at other options, by a choice that hung on rounding
  others: int  # ran at other options for no such reason
  largest: float  # difference of probabilities, where the options are the same

  @property
  def holds(self) -> bool:
    """Whether the two agree."""
    return not self.others and self.largest <= TOLERANCE['f32']

  def __str__(self) -> str:
    return (
      f'{self.images} images, probabilities within {self.largest:.1e} of JAX, '
      f'options differ on {self.others}, and on {self.ties} that are ties'
    )


def compare(
  ours: Classifier, theirs: Classifier, images: Sequence[Any]
) -> Parity:
  """Runs images through two paths of one model that follow one policy.

  What cannot be read is left out, as in evaluation.

  Raises:
    UserError: none of the images can be read.
  """
  ties = others = unread = 0
  largest = 0.0
  answers = (c.predict(images, on_error='return') for c in (ours, theirs))
  for image, a, b in zip(images, *answers, strict=True):
    if isinstance(a, Failure):
      unread += 1
    elif a.ran == b.ran:
      difference = np.abs(a.probabilities - b.probabilities).max()
      largest = max(largest, float(difference))
    elif _is_tie(ours, image):
      ties += 1
    else:
      others += 1
  count = len(images) - unread
  if images and not count:
    raise UserError('none of the images to compare can be read')
  return Parity(theirs.engine.name, count, ties, others, largest)


def _is_tie(classifier: Classifier, image: Any) -> bool:
  """Whether a choice for an image changes when it is shaken a little."""
  policy, contract = classifier.policy, classifier.contract
  limits = np.asarray(policy.stop)
  shaken, ran = copy.copy(classifier), set()
  for shift in (_TIE, -_TIE):
    stop = tuple((limits + shift).tolist())
    shaken.policy = dataclasses.replace(policy, stop=stop)
    ran.add(shaken.predict([image])[0].ran)
  if len(ran) > 1 or policy.start is None:
    return len(ran) > 1
  view = classifier.picture(image).crop(contract.predictor_view)
  log_p = np.asarray(classifier.engine.log_p(view[None]))[0]
  known = [contract.routes.index(j) for j in policy.path]
  dial = policy.start
  for penalty in (dial.low, dial.high) if dial.share else (dial.low,):
    best = np.sort(log_p[known] - penalty * np.asarray(dial.costs))
    if best[-1] - best[-2] <= _TIE:
      return True
  return False
