# SPDX-License-Identifier: Apache-2.0
"""Inference that runs each image at its chosen size, and at no other."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from drnet_jax import mesh as mesh_lib
from drnet_jax import routing, settings, workdir
from drnet_jax.data.pipeline import Data

_MOST_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a model says of an image.

  Attributes:
    label: index of the likeliest class.
    name: of that class.
    probability: of that class.
    size_px: size the image was run at.
    gmacs: cost, predictor counted.
    full_gmacs: cost of the base network alone at the largest size.
  """

  label: int
  name: str
  probability: float
  size_px: int
  gmacs: float
  full_gmacs: float


class Classifier:
  """A trained model, ready to classify.

  Args:
    trained: from `workdir.load`.
  """

  def __init__(self, trained: workdir.Trained):
    self._trained = trained
    self._data = settings.call(Data, trained.config.data, 'config.data')
    self._macs = trained.model.macs()
    self._ladder = routing.bucket_ladder(_MOST_AT_ONCE, growth=2.0)
    self._route = jax.jit(
      functools.partial(_route, trained.model, trained.has_router)
    )
    self._classify = jax.jit(
      functools.partial(_classify, trained.model), static_argnums=0
    )

  @classmethod
  def load(cls, path: str) -> 'Classifier':
    """From the latest weights of a workdir."""
    return cls(workdir.load(path, mesh_lib.create(1)))

  def read(self, source: bytes | str) -> np.ndarray:
    """Reads an image file (or its bytes) as the model wants it.

    Raises:
      UserError: it cannot be read.
    """
    return self._data.eval_image(source, self._trained.model.image_px)

  def __call__(self, images: Sequence[np.ndarray]) -> list[Prediction]:
    """Classifies images.

    Args:
      images: from `read`, uint8 [image_px, image_px, 3] each.

    Returns:
      One prediction each, in order.
    """
    predictions: list[Prediction] = []
    for start in range(0, len(images), _MOST_AT_ONCE):
      predictions += self._some(np.stack(images[start : start + _MOST_AT_ONCE]))
    return predictions

  def _some(self, images: np.ndarray) -> list[Prediction]:
    trained, model = self._trained, self._trained.model
    weights = trained.params, trained.batch_stats
    choice = np.asarray(self._route(*weights, self._padded(images)))
    choice = choice[: len(images)]
    predictions: list = [None] * len(images)
    for j in np.unique(choice):
      (takers,) = np.nonzero(choice == j)
      probabilities = np.asarray(
        self._classify(int(j), *weights, self._padded(images[takers]))
      )
      for i, p in zip(takers, probabilities, strict=False):
        label = int(p.argmax())
        predictions[i] = Prediction(
          label=label,
          name=trained.class_names[label],
          probability=float(p[label]),
          size_px=model.resolutions[j],
          gmacs=self._macs.gmacs[j]
          + trained.has_router * self._macs.predictor / 1e9,
          full_gmacs=self._macs.gmacs[-1],
        )
    return predictions

  def _padded(self, images: np.ndarray) -> np.ndarray:
    missing = routing.bucket(len(images), self._ladder) - len(images)
    return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])


def _route(model, has_router, params, batch_stats, images):
  """Index of the size for each image; the largest without a router."""
  if not has_router:
    return jax.numpy.full(len(images), len(model.resolutions) - 1)
  logits, _ = model.predict(
    params['predictor'], batch_stats['predictor'], images, train=False
  )
  return routing.choose(logits)


def _classify(model, size_index, params, batch_stats, images):
  size_px = model.resolutions[size_index]
  logits = model.logits_at(params, batch_stats, images, size_px)
  return jax.nn.softmax(logits)
