# SPDX-License-Identifier: Apache-2.0
"""RandAugment (arXiv:1909.13719): a few random changes of one strength.

Operations and strengths are those of torchvision.transforms.RandAugment, of 31
magnitudes. On the host, since each image goes its own way.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_STRONGEST = 30


def apply(
  image: np.ndarray, rng: np.random.Generator, num_ops: int, magnitude: int
) -> np.ndarray:
  """Changes an image, uint8 [H, W, 3], by operations drawn with replacement.

  `num_ops` of them, one after the other. What the magnitude, 0 to 30, means
  depends on the operation; some are given a random sign.
  """
  strength = magnitude / _STRONGEST
  picture = Image.fromarray(image)
  for i in rng.integers(len(_OPERATIONS), size=num_ops):
    sign = 1 if rng.random() < 0.5 else -1
    picture = _OPERATIONS[i](picture, strength, sign)
  return np.asarray(picture)


def _affine(coefficients: Callable) -> Callable:
  """Moves pixels: output (x, y) is input (ax + by + c, dx + ey + f)."""

  def move(picture: Image.Image, strength: float, sign: int) -> Image.Image:
    data = coefficients(sign * strength, *picture.size)
    return picture.transform(picture.size, Image.Transform.AFFINE, data)

  return move


def _enhance(kind: type) -> Callable:
  return lambda picture, s, sign: kind(picture).enhance(1 + sign * 0.9 * s)


_OPERATIONS = (
  lambda picture, s, sign: picture,
  _affine(lambda s, w, h: (1, 0.3 * s, 0, 0, 1, 0)),  # shear
  _affine(lambda s, w, h: (1, 0, 0, 0.3 * s, 1, 0)),
  _affine(lambda s, w, h: (1, 0, s * w * 150 / 331, 0, 1, 0)),  # translate
  _affine(lambda s, w, h: (1, 0, 0, 0, 1, s * h * 150 / 331)),
  lambda picture, s, sign: picture.rotate(sign * 30 * s),
  _enhance(ImageEnhance.Brightness),
  _enhance(ImageEnhance.Color),
  _enhance(ImageEnhance.Contrast),
  _enhance(ImageEnhance.Sharpness),
  lambda picture, s, sign: ImageOps.posterize(picture, 8 - round(4 * s)),
  lambda picture, s, sign: ImageOps.solarize(picture, 255 * (1 - s)),
  lambda picture, s, sign: ImageOps.autocontrast(picture),
  lambda picture, s, sign: ImageOps.equalize(picture),
)
