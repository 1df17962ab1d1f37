# SPDX-License-Identifier: Apache-2.0
"""What happens to one image on the host: decoding and cropping, no more.

Flips, normalisation and every resize to a candidate size run on the device.
"""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from drnet_jax.errors import UserError

# A JPEG that is decoded at a part of its size keeps at least so many times the
# pixels, each way, that it is resized to. Decoders shrink more sharply than a
# resize: without a margin a ResNet-50 loses five points at 112 px
# (results/inference.md).
DECODE_MARGIN = 2


class UnreadableImage(UserError):
  """One image that cannot be read, where others may."""


def decode(source: bytes | str, *, least_px: int | None = None) -> np.ndarray:
  """Reads an image file as 8-bit RGB, the right way up.

  Grey becomes three equal channels, 16 bits become 8, transparency shows
  white, of an animation the first frame counts, EXIF rotation is applied.

  Args:
    source: the file's bytes, or its path.
    least_px: where given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size
      (fewer coefficients of its cosine transform) as long as its short side
      keeps this many pixels.

  Returns:
    uint8 [H, W, 3].

  Raises:
    UnreadableImage: no image, or a truncated one.
  """
  with opened(source) as image:
    if least_px:
      image.draft(None, (least_px, least_px))
    return to_rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def opened(source: bytes | str) -> Iterator[Image.Image]:
  """Opens an image file, whose pixels are not decoded yet.

  Raises:
    UnreadableImage: what goes wrong within the context, too.
  """
  name = source if isinstance(source, str) else f'{len(source)} bytes'
  try:
    with Image.open(
      source if isinstance(source, str) else io.BytesIO(source)
    ) as image:
      if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
          f'{image.width} x {image.height} pixels, more than '
          f'{Image.MAX_IMAGE_PIXELS}'
        )
      yield image
  except Image.UnidentifiedImageError as error:
    # Pillow's own message shows the address of a buffer.
    raise UnreadableImage(
      f'cannot read {name} as an image: no known format'
    ) from error
  except (OSError, SyntaxError, ValueError) as error:
    raise UnreadableImage(f'cannot read {name} as an image: {error}') from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise UnreadableImage(f'{name} is too large an image: {e}') from e


def to_rgb(image: Image.Image) -> np.ndarray:
  """An image of any mode as uint8 [H, W, 3]; see `decode`."""
  if image.mode.startswith('I;16') or image.mode in ('I', 'F'):
    # Pillow would clip 16 bits at 255 instead of scaling them.
    grey = np.asarray(image, np.float32)
    grey = np.clip(grey / (257 if image.mode != 'F' else 1), 0, 255)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, -1)
  if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or (
    'transparency' in image.info
  ):
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return np.asarray(image.convert('RGB'))


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
    size_px: side of the result.
    resize_px: at least `size_px`.
    keep_aspect: make the short side `resize_px`; else squash both to it.

  Returns:
    uint8 [size_px, size_px, 3].
  """
  height, width = image.shape[:2]
  scale = resize_px / min(height, width)
  if keep_aspect:
    width = max(round(width * scale), resize_px)
    height = max(round(height * scale), resize_px)
  else:
    width = height = resize_px
  image = resize(image, width, height)
  top, left = (height - size_px) // 2, (width - size_px) // 2
  return image[top : top + size_px, left : left + size_px]


def random_shift(
  image: np.ndarray, size_px: int, rng: np.random.Generator
) -> np.ndarray:
  """Pads by an eighth of the side with black, cuts the side out at random.

  On CIFAR the usual 4 pixels.

  Args:
    image: uint8 [H, W, 3].
    size_px: side of the result; the image is brought to it first.
    rng: draws the place.

  Returns:
    uint8 [size_px, size_px, 3].
  """
  image = center_crop(image, size_px, resize_px=size_px, keep_aspect=True)
  pad = size_px // 8
  image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
  top, left = rng.integers(0, 2 * pad + 1, 2)
  return image[top : top + size_px, left : left + size_px]
