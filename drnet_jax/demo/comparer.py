# SPDX-License-Identifier: Apache-2.0
"""One image under every option of a model: what each says, sees and takes."""

import copy
import dataclasses
import functools
import threading
from typing import Any

import numpy as np

from drnet_jax import resize
from drnet_jax.bench import stopwatch
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.search import Point
from drnet_jax.errors import UserError
from drnet_jax.serve.answers import Prediction, failure
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.picture import Picture

_ROUNDS = 5  # timed runs of each option; their median counts


@dataclasses.dataclass(frozen=True)
class Tried:
  """An option that an image is run at without a choice."""

  prediction: Prediction
  ms: float  # from the crop to the answer, warm, one image at a time
  view: np.ndarray  # uint8 [S, S, 3], the pixels that the network reads


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What a policy does with an image, beside what it could have done."""

  answer: Prediction  # of the policy, everything counted
  ms: float  # as `Tried.ms`, everything counted
  options: tuple[Tried, ...]  # all of them, the cheapest first

  @property
  def last(self) -> Tried:
    """The option at which the image left."""
    return next(
      x for x in self.options if x.prediction.option == self.answer.option
    )

  @property
  def full(self) -> Tried:
    """The most expensive option."""
    return max(self.options, key=lambda x: x.prediction.gmacs)


class Comparer:
  """A model, to be asked about one image at a time; from any thread.

  Args:
    classifier: runs it, loaded with batch=1.
  """

  def __init__(self, classifier: Classifier):
    self._classifier = classifier
    self.contract = classifier.contract
    self.calibration = classifier.calibration
    self.options = self.contract.options.names  # the cheapest first
    self._stopwatch = threading.Lock()

  @property
  def budgets(self) -> tuple[float, float] | None:
    """Least and largest average cost in GMACs; None: nothing to set."""
    if self.calibration is None:
      return None
    points = self.calibration.points['GMACs']['best']
    low, high = points[0].gmacs, points[-1].gmacs
    return (low, high) if low < high else None

  def promise(self, gmacs: float) -> Point:
    """The best policy for a budget, and what it gives when calibrated."""
    return self.calibration.find(gmacs=gmacs)

  def option(self, name: str) -> Policy:
    """Every image at one option."""
    return policy_lib.fixed(self.options.index(name))

  def compare(self, source: Any, policy: Policy) -> Comparison:
    """Runs an image by a policy, and at every option.

    Args:
      source: a path, bytes, a PIL image or an array; see `Picture`.
      policy: to follow.

    Raises:
      UserError: the image cannot be read.
    """
    picture = self._read(source)
    fixed = [policy_lib.fixed(j) for j in range(len(self.options))]
    jobs = {}
    for i, one in enumerate([policy, *fixed]):
      # It shares the compiled networks, and has a policy of its own: whoever
      # asks at the same time for another budget is not disturbed.
      run = copy.copy(self._classifier)
      run.policy = one
      jobs[i] = functools.partial(run.predict, [picture])
    answers = [job()[0] for job in jobs.values()]
    with self._stopwatch:  # two at once would slow each other down
      seconds = stopwatch.interleaved(jobs, _ROUNDS, 'comparing')
    ms = [1e3 * float(np.median(x)) for x in seconds.values()]
    views = [self._view(picture, j) for j in range(len(fixed))]
    options = tuple(map(Tried, answers[1:], ms[1:], views))
    return Comparison(answers[0], ms[0], options)

  def _read(self, source: Any) -> Picture:
    """An image with its crops, so that no option is charged for decoding."""
    picture, contract = self._classifier.picture(source), self.contract
    views = [contract.predictor_view] if contract.routes else []
    try:
      picture.cut([*views, *contract.views])
    except Exception as error:  # a decoder may raise anything on rubbish
      raise UserError(failure(0, source, error).reason) from error
    return picture

  def _view(self, picture: Picture, option: int) -> np.ndarray:
    crop = picture.crop(self.contract.views[option])
    view = resize.network_view(
      crop[None],
      self.contract.sizes_px[option],
      mean=(0.0,) * 3,
      std=(1.0,) * 3,
      antialias=self.contract.antialias[option],
    )
    return np.asarray((255 * view[0]).round().astype(np.uint8))
