# SPDX-License-Identifier: Apache-2.0
"""One image under every option of a model: what each says, sees and takes."""

import copy
import dataclasses
import threading
from typing import Any

import numpy as np

from drnet_jax import resize
from drnet_jax.bench import stopwatch as timing
from drnet_jax.errors import UserError
from drnet_jax.models.ranet import RANet
from drnet_jax.run import workdir
from drnet_jax.serve.answers import Prediction, failure
from drnet_jax.serve.budget import Calibration, Point
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.early_exit import EarlyExitClassifier
from drnet_jax.serve.exit_budget import ExitCalibration, ExitPoint
from drnet_jax.serve.picture import Picture

_ROUNDS = 5  # timed runs of each option; their median counts


@dataclasses.dataclass(frozen=True)
class Option:
  """A size, or an exit, that an image is run at without a choice.

  Attributes:
    prediction: what it says.
    ms: from the crop to the answer, warm, one image at a time.
    view: uint8 [S, S, 3], the pixels that the network reads.
  """

  prediction: Prediction
  ms: float
  view: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What a model does with an image, beside what it could have done.

  Attributes:
    answer: of the option that was chosen; its cost counts the predictor.
    ms: as `Option.ms`, the predictor counted.
    options: all of them, the cheapest first.
  """

  answer: Prediction
  ms: float
  options: tuple[Option, ...]

  @property
  def chosen(self) -> Option:
    """The option that was chosen."""
    return next(
      x for x in self.options if x.prediction.option == self.answer.option
    )

  @property
  def full(self) -> Option:
    """The fixed network: the largest size, or the last exit."""
    return self.options[-1]


class Comparer:
  """A model, to be asked about one image at a time; from any thread.

  Args:
    trained: the model.
    runtime: see `Classifier.load`.
    calibration: for budgets; None where the model was not calibrated.

  Attributes:
    options: names, the cheapest first: '112 px', or 'exit 3'.
    has_exits: whether these are exits.
  """

  def __init__(
    self,
    trained: workdir.Trained,
    *,
    runtime: str = 'jax',
    calibration: Calibration | ExitCalibration | None = None,
  ):
    self._model = trained.model
    self._classifier = Classifier.of(
      trained, runtime=runtime, calibration=calibration, batch=1
    )
    self.calibration = calibration
    self.options = trained.model.options
    self.has_exits = isinstance(trained.model, RANet)
    self._has_router = trained.has_router
    self._fixed = [self._at(option) for option in self.options]
    self._stopwatch = threading.Lock()

  @property
  def chooses(self) -> bool:
    """Whether there is a choice: a predictor, or exits with a budget."""
    return self._has_router or (self.has_exits and bool(self.calibration))

  @property
  def budgets(self) -> tuple[float, float] | None:
    """Least and largest average cost in GMACs; None: not calibrated."""
    if not (self.calibration and self.chooses):
      return None
    costs = self.calibration.gmacs
    return (
      min(costs.sizes) + costs.predictor,
      max(costs.sizes) + costs.predictor,
    )

  @property
  def usual_gmacs(self) -> float:
    """The budget of the router as trained, or that of evenly used exits."""
    setting = 1.0 if self.has_exits else 0.0
    return self.calibration.at(self.calibration.gmacs, setting).gmacs

  def promise(self, gmacs: float) -> Point | ExitPoint:
    """What a budget gives on the images of the calibration."""
    return self._copy().set_budget(gmacs=gmacs)

  def compare(
    self, source: Any, *, gmacs: float | None = None, option: str | None = None
  ) -> Comparison:
    """Runs an image as it would be chosen, and at every option.

    Args:
      source: a path, bytes, a PIL image or an array; see `Picture`.
      gmacs: budget by which to choose; default as the model was trained (one
        with exits: the last).
      option: one of `options`, instead of a choice.

    Raises:
      UserError: the image cannot be read, or the budget is out of reach.
    """
    picture = self._read(source)
    choosing = self._at(option) if option else self._copy()
    if gmacs is not None:
      choosing.set_budget(gmacs=gmacs)
    runs = [choosing, *self._fixed]
    answers = [run.predict([picture])[0] for run in runs]
    with self._stopwatch:  # two at once would slow each other down
      seconds = timing.interleaved(
        {
          i: lambda run=run: run.predict([picture])
          for i, run in enumerate(runs)
        },
        _ROUNDS,
        'comparing',
      )
    ms = [1e3 * float(np.median(seconds[i])) for i in range(len(runs))]
    options = tuple(
      Option(answer, time, self._view(picture, k))
      for k, (answer, time) in enumerate(zip(answers[1:], ms[1:], strict=True))
    )
    return Comparison(answers[0], ms[0], options)

  def _read(self, source: Any) -> Picture:
    """An image with its crop, so that no option is charged for decoding."""
    picture = self._classifier.picture(source)
    try:
      picture.crop(self._model.image_px)
    except Exception as error:  # a decoder may raise anything on rubbish
      raise UserError(failure(0, source, error).reason) from error
    return picture

  def _copy(self) -> Classifier | EarlyExitClassifier:
    """Shares the compiled networks, and has a policy of its own.

    Whoever asks at the same time for another budget is not disturbed.
    """
    return copy.copy(self._classifier)

  def _at(self, option: str) -> Classifier | EarlyExitClassifier:
    index, fixed = self.options.index(option), self._copy()
    if self.has_exits:
      fixed.set_exit(index + 1)
    else:
      fixed.set_size(self._model.resolutions[index])
    return fixed

  def _view(self, picture: Picture, index: int) -> np.ndarray:
    model = self._model
    crop = picture.crop(model.image_px)
    if self.has_exits:
      return crop
    view = resize.network_view(
      crop[None],
      model.resolutions[index],
      mean=(0.0,) * 3,
      std=(1.0,) * 3,
      antialias=model.antialias,
    )
    return np.asarray((255 * view[0]).round().astype(np.uint8))
