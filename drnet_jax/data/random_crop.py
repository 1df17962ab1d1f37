# SPDX-License-Identifier: Apache-2.0
"""Random resized crops straight from image files, the work of training input.

Of a JPEG that is grey or RGB and upright the crop is drawn from the header,
before anything is decoded, and it is decoded at 1/2, 1/4 or 1/8 of its size
where the crop has the pixels to spare; any other file is decoded whole first.
Two libraries speed this up where they are installed (`drnet_jax[fast]`):
simplejpeg, a binding of libjpeg-turbo, decodes, and OpenCV enlarges. What is
cut out and how it is resized does not depend on them, nor which files count as
unreadable: both decoders are libjpeg-turbo and give the same pixels, and
OpenCV rounds to at most one grey level from Pillow. Evaluation uses Pillow
alone.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from drnet_jax.data import pixels, transforms


@dataclasses.dataclass(frozen=True)
class Codec:
  """What does the work; the result is the same but for rounding.

  Attributes:
    decode: a plain JPEG at 1 / n of its size to uint8 RGB [H, W, 3].
    enlarge: uint8 [H, W, 3] bilinearly to a square of a side; None for Pillow.
  """

  decode: Callable[[Image.Image, int], np.ndarray]
  enlarge: Callable[[np.ndarray, int], np.ndarray] | None


def random_resized_crop(
  source: bytes | str,
  size_px: int,
  rng: np.random.Generator,
  codec: Codec | None = None,
  *,
  least: float = 0.08,
  max_pixels: int = 0,
) -> np.ndarray:
  """Cuts a part of the image at an aspect of 3/4 to 4/3, and resizes it.

  Args:
    source: bytes of an image file, or its path.
    size_px: side of the result, uint8 [size_px, size_px, 3].
    rng: draws the crop.
    codec: by default the fastest there is.
    least: share of the area that the part has at least.
    max_pixels: see `pixels.opened`.

  Raises:
    UnreadableImage: no image, or a truncated one.
  """
  codec = codec or fastest()
  with pixels.opened(source, max_pixels) as image:
    if _is_plain_jpeg(image):
      image_size = image.size  # before a decoder takes a part of it
      box = _draw_box(*image_size, least, rng)
      needed_px = transforms.DECODE_MARGIN * size_px
      spare = min(box[2] - box[0], box[3] - box[1]) // needed_px
      part = pixels.fraction(image, spare, max_pixels)
      decoded = codec.decode(image, part)
      # An odd side is rounded up.
      across, down = (math.ceil(x / part) / x for x in image_size)
      box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
      return _resized(decoded, box, size_px, codec)
    pixels.shrink(image, pixels.fraction(image, 1, max_pixels))
    decoded = pixels.to_rgb(image)
    del image  # with its own copy of the pixels
  height, width = decoded.shape[:2]
  return _resized(decoded, _draw_box(width, height, least, rng), size_px, codec)


@functools.cache
def fastest() -> Codec:
  """The fastest codec that the installed libraries make."""
  return Codec(
    decode=with_turbo if optional('simplejpeg') else with_pillow,
    enlarge=with_opencv if optional('cv2') else None,
  )


@functools.cache
def optional(name: str):
  """A library that may be missing: the module, or None."""
  try:
    module = importlib.import_module(name)
  except ImportError:
    return None
  if name == 'cv2':
    module.setNumThreads(0)  # Grain has threads of its own
  return module


def with_pillow(image: Image.Image, shrink: int) -> np.ndarray:
  """See `Codec.decode`."""
  pixels.shrink(image, shrink)
  return np.asarray(image.convert('RGB'))


def with_turbo(image: Image.Image, shrink: int) -> np.ndarray:
  """See `Codec.decode`."""
  sides = {}
  if shrink > 1:
    sides['min_width'] = image.width // shrink
    sides['min_height'] = image.height // shrink
  image.fp.seek(0)
  try:
    return optional('simplejpeg').decode_jpeg(image.fp.read(), 'RGB', **sides)
  except Exception:
    # Pillow forgives more. What it refuses is unreadable.
    return with_pillow(image, shrink)


def with_opencv(image: np.ndarray, size_px: int) -> np.ndarray:
  """See `Codec.enlarge`; the weights are those of Pillow."""
  cv2 = optional('cv2')
  return cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_LINEAR)


def _is_plain_jpeg(image: Image.Image) -> bool:
  return (
    image.format == 'JPEG'
    and image.mode in ('L', 'RGB')
    and pixels.orientation(image) not in range(2, 9)
  )


def _draw_box(
  width: int, height: int, least: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Left, top, right, bottom."""
  for _ in range(10):
    area = height * width * rng.uniform(least, 1.0)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = rng.integers(0, height - h + 1)
      left = rng.integers(0, width - w + 1)
      return left, top, left + w, top + h
  side = min(width, height)
  left, top = (width - side) // 2, (height - side) // 2
  return left, top, left + side, top + side


def _resized(
  decoded: np.ndarray, box: tuple[float, ...], size_px: int, codec: Codec
) -> np.ndarray:
  """A box bilinearly resized, with a low-pass before shrinking."""
  left, top = math.floor(box[0]), math.floor(box[1])
  right, bottom = math.ceil(box[2]), math.ceil(box[3])
  cut = decoded[top:bottom, left:right]
  is_whole = (left, top, right, bottom) == box
  if codec.enlarge and is_whole and max(cut.shape[:2]) <= size_px:
    return codec.enlarge(cut, size_px)
  inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
  image = Image.fromarray(cut)
  side = (size_px, size_px)
  return np.asarray(image.resize(side, Image.Resampling.BILINEAR, box=inner))
