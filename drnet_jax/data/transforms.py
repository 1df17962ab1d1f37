# SPDX-License-Identifier: Apache-2.0
"""Crops and shifts of one image, on the host.

RandAugment is in `rand_augment`; flips, normalisation and every resize to a
candidate size run on the device.
"""

import numpy as np
from PIL import Image

# A JPEG that is decoded at a part of its size keeps at least so many times the
# pixels, each way, that it is resized to. Decoders shrink more sharply than a
# resize: without a margin a ResNet-50 loses five points at 112 px
# (results/inference.md).
DECODE_MARGIN = 2
# Of an image that is longer than this many times its short side only the middle
# is resized: 1 x 65,000 pixels would become 256 x 16,640,000.
_LONGEST = 8


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
  """Resizes bilinearly, with a low-pass before shrinking; uint8 [H, W, 3]."""
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(
    Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
  )


def center_crop(
  image: np.ndarray, size_px: int, *, resize_px: int, keep_aspect: bool
) -> np.ndarray:
  """Resizes the image, then cuts the middle square.

  Args:
    image: uint8 [H, W, 3].
    size_px: side of the result, uint8 [size_px, size_px, 3].
    resize_px: at least `size_px`.
    keep_aspect: make the short side `resize_px`; else squash both to it.
  """
  height = width = resize_px
  if keep_aspect:
    most = _LONGEST * min(image.shape[:2])
    top, left = (max(side - most, 0) // 2 for side in image.shape[:2])
    image = image[top : len(image) - top, left : image.shape[1] - left]
    scale = resize_px / min(image.shape[:2])
    height, width = (
      max(round(side * scale), resize_px) for side in image.shape[:2]
    )
  image = resize(image, width, height)
  top, left = (height - size_px) // 2, (width - size_px) // 2
  return image[top : top + size_px, left : left + size_px]


def random_shift(
  image: np.ndarray, size_px: int, rng: np.random.Generator
) -> np.ndarray:
  """Pads by an eighth of the side with black, cuts the side out at random.

  On CIFAR the usual 4 pixels. The image, uint8 [H, W, 3], is brought to the
  side of the result, `size_px`, first.
  """
  image = center_crop(image, size_px, resize_px=size_px, keep_aspect=True)
  pad = size_px // 8
  image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
  top, left = rng.integers(0, 2 * pad + 1, 2)
  return image[top : top + size_px, left : left + size_px]
