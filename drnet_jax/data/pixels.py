# SPDX-License-Identifier: Apache-2.0
"""Pixels of whatever kind as 8-bit RGB, by one table for files and in memory.

| given as a file, a PIL image or an array | read as |
|---|---|
| 1 bit, bool | black and white |
| 16-bit integers | their upper byte: 65,535 is white |
| integers of more bits | 8 bits; refused unless all lie within 0 and 255 |
| floats | 0 is black, 1 is white; refused outside |
| grey | three equal channels |
| palette, CMYK, YCbCr | its colours |
| alpha, or a colour that is transparent | on white |
| an animation | the first frame |
| EXIF's orientation | turned the right way up |

Of a file nothing else than its pixels and its orientation is read: a photograph
with damaged notes is a photograph. A file that ends early is refused, for what
is missing would be shown as grey. Exports carry this file (`package.write`).
"""

import contextlib
import functools
import io
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from drnet_jax.errors import UserError

with contextlib.suppress(ImportError):  # an option: .heic, and .avif
  import pillow_heif

  pillow_heif.register_heif_opener()

_LIMIT = 'DRNET_JAX_MAX_PIXELS'
_USUAL_LIMIT = 2**30 // 12  # that of Pillow: a quarter of a GiB as RGB
# Formats that Pillow knows by name only, or hands to another program.
_NOT_READ = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}
_PNG = b'\x89PNG\r\n\x1a\n'
_PNG_CHUNKS = (b'IHDR', b'PLTE', b'tRNS', b'eXIf', b'IDAT', b'IEND')
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_AT_ONCE = 2**22  # pixels that are converted at a time, for memory's sake


class UnreadableImage(UserError):
  """One image that cannot be read, where others may."""


def decode(
  source: Any, *, least_px: int | None = None, max_pixels: int = 0
) -> np.ndarray:
  """An image of whatever kind as 8-bit RGB, uint8 [H, W, 3], the right way up.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array [H, W],
      [H, W, 1], [H, W, 2] (alpha), [H, W, 3] or [H, W, 4] (alpha).
    least_px: where given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size
      (fewer coefficients of its cosine transform) as long as its short side
      keeps this many pixels.
    max_pixels: of a file, see `opened`.

  Raises:
    UnreadableImage: whatever is wrong with it.
  """
  if isinstance(source, os.PathLike):
    source = os.fspath(source)
  elif isinstance(source, bytearray | memoryview):
    source = bytes(source)
  if isinstance(source, str | bytes):
    with opened(source, max_pixels) as image:
      spare = min(image.size) // least_px if least_px else 1
      shrink(image, fraction(image, spare, max_pixels))
      return to_rgb(image)
  if isinstance(source, Image.Image):
    with _unreadable('the PIL image'):
      return to_rgb(source)
  with _unreadable('the array'):
    return _from_array(np.asarray(source))


@contextlib.contextmanager
def opened(source: bytes | str, max_pixels: int = 0) -> Iterator[Image.Image]:
  """Opens an image file, whose pixels are not decoded yet.

  Args:
    source: the file's bytes, or its path.
    max_pixels: the most that are decoded: a larger JPEG comes at a part of its
      size (see `fraction`), another file is refused. 0 for the value of the
      environment's DRNET_JAX_MAX_PIXELS, or 89 million.

  Raises:
    UnreadableImage: whatever any decoder raises within the context, too.
  """
  name = source if isinstance(source, str) else f'{len(source)} bytes'
  limit = max_pixels or _usual_limit()
  if limit > (Image.MAX_IMAGE_PIXELS or limit):
    Image.MAX_IMAGE_PIXELS = limit  # someone asked for it
  with (
    _unreadable(name),
    open(source, 'rb') if isinstance(source, str) else io.BytesIO(source) as f,
    _open(f) as image,
  ):
    part = fraction(image, 1, limit)
    if image.width * image.height > part**2 * limit:
      raise Image.DecompressionBombError(
        f'{image.width} x {image.height} pixels, more than {limit}'
      )
    yield image


def fraction(image: Image.Image, spare: float, max_pixels: int = 0) -> int:
  """1, 2, 4 or 8: a JPEG is best decoded at 1 / this of its size.

  Args:
    image: opened.
    spare: how many times more pixels it has, each way, than are needed.
    max_pixels: see `opened`; as long as there are more, the next fraction.
  """
  if not isinstance(image, JpegImagePlugin.JpegImageFile):
    return 1
  found = next(k for k in (8, 4, 2, 1) if k <= max(spare, 1))
  # All of a progressive file's coefficients are held at a time, at any size.
  if 'progressive' not in image.info:
    limit = max_pixels or _usual_limit()
    while found < 8 and image.width * image.height > found**2 * limit:
      found *= 2
  return found


def shrink(image: Image.Image, part: int) -> None:
  """Has a JPEG decoded at 1 / `part` of its size, see `fraction`."""
  if part > 1:
    image.draft(None, (image.width // part, image.height // part))


def orientation(image: Image.Image) -> int:
  """EXIF's, 1 to 8, whatever else is in there; 1 if it cannot be found."""
  exif = image.info.get('exif')
  if not isinstance(exif, bytes):
    # A TIFF has it among its own tags.
    return getattr(image, 'tag_v2', {}).get(_ORIENTATION, 1)
  # The first one: notes of the camera may have headers of their own.
  header = re.search(rb'II\*\0|MM\0\*', exif)
  if header is None:
    return 1
  start = header.start()
  order = 'little' if header[0].startswith(b'I') else 'big'

  def number(place: int, size: int = 2) -> int:  # 0 where nothing is left
    return int.from_bytes(exif[place : place + size], order)

  first = start + number(start + 4, 4)
  for tag in range(first + 2, first + 2 + 12 * number(first), 12):
    if number(tag) == _ORIENTATION:
      return number(tag + 8, 4 if number(tag + 2) == 4 else 2)
  return 1


def to_rgb(image: Image.Image) -> np.ndarray:
  """An image of any mode as uint8 [H, W, 3], the right way up."""
  image.load()  # what is read after the pixels may tell the orientation
  is_deep = image.mode == 'I' and image.format == 'PPM'
  turn = _TURNS.get(orientation(image))
  if turn is not None:
    image = image.transpose(turn)
  rows = math.ceil(_AT_ONCE / image.width)
  if image.height <= rows:
    return _convert(image, is_deep)
  pixels = np.empty((image.height, image.width, 3), np.uint8)
  for top in range(0, image.height, rows):
    box = (0, top, image.width, min(top + rows, image.height))
    pixels[top : top + rows] = _convert(image.crop(box), is_deep)
  return pixels


@functools.cache
def formats() -> tuple[str, ...]:
  """Names of the formats that are read, those of plugins too."""
  Image.init()
  return tuple(name for name in Image.ID if name not in _NOT_READ)


@functools.cache
def endings() -> tuple[str, ...]:
  """Of the names of files in these formats, in lower case."""
  known = {*formats(), 'MPO'}  # which opens as a JPEG
  return tuple(
    k for k, v in Image.registered_extensions().items() if v in known
  )


class _Jpeg(JpegImagePlugin.JpegImageFile):
  def _read_dpi_from_exif(self) -> None:
    """Does not: it would have Pillow parse EXIF, and complain of damages."""


@contextlib.contextmanager
def _unreadable(name: str) -> Iterator[None]:
  """Whatever a decoder raises says that this image cannot be read."""
  try:
    yield
  except UserError:
    raise
  except Image.UnidentifiedImageError as error:
    # Pillow's own message shows the address of a buffer.
    raise UnreadableImage(
      f'cannot read {name} as an image: no known format'
    ) from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise UnreadableImage(
      f'{name} is too large an image: {e}. To read it set {_LIMIT} in the '
      'environment, or, to train and evaluate, config.data.max_pixels.'
    ) from e
  except Exception as error:  # MemoryError is one
    what = ' '.join(str(error).split())
    if not isinstance(error, OSError | ValueError):
      what = f'{type(error).__name__} {what}'
    raise UnreadableImage(f'cannot read {name} as an image: {what}') from error


@functools.cache
def _usual_limit() -> int:
  text = os.environ.get(_LIMIT) or str(_USUAL_LIMIT)
  if not text.isdecimal() or not int(text):
    raise UserError(f'{_LIMIT} = {text!r} in the environment is no number')
  return int(text)


def _open(file) -> Image.Image:
  start = file.read(len(_PNG))
  file.seek(0)
  if start.startswith(b'\xff\xd8\xff'):
    # Without Pillow's limit: it can be decoded at a part of its size.
    return _Jpeg(file)
  if start == _PNG:
    file = io.BytesIO(_without_notes(file.read()))
  return Image.open(file, formats=formats())


def _without_notes(png: bytes) -> bytes:
  """A PNG without its texts and profiles, which Pillow would unpack."""
  parts, place = [_PNG], len(_PNG)
  while place < len(png):
    end = place + 12 + int.from_bytes(png[place : place + 4], 'big')
    if png[place + 4 : place + 8] in _PNG_CHUNKS:
      parts.append(png[place:end])
    place = end
  return b''.join(parts)


def _convert(image: Image.Image, is_deep: bool) -> np.ndarray:
  """The table; where `is_deep`, the image's 32-bit integers are of 16 bits."""
  if image.mode.startswith('I') or image.mode == 'F':
    grey = np.array(image, np.uint16 if is_deep else None)
    grey[grey == image.info.get('transparency')] = grey.dtype.type(65535)
    return _from_array(grey)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))


def _from_array(x: np.ndarray) -> np.ndarray:
  """The table, for arrays."""
  if x.ndim == 2:
    x = x[..., None]
  if x.ndim != 3 or x.shape[-1] not in (1, 2, 3, 4) or 0 in x.shape:
    raise ValueError(
      f'an array of shape {list(x.shape)} is no image [H, W], [H, W, 1], '
      '[H, W, 2], [H, W, 3] or [H, W, 4]'
    )
  if x.dtype == bool:
    x = x * np.uint8(255)
  elif x.dtype.kind == 'u' and x.dtype.itemsize == 2:
    x = (x >> 8).astype(np.uint8)
  elif x.dtype.kind in 'iu':
    if x.dtype != np.uint8:
      _check_range(x, 255)
    x = x.astype(np.uint8)
  elif x.dtype.kind in 'fV':  # bfloat16 is of numpy's kind V
    x = x.astype(np.float32)
    _check_range(x, 1)
    x = (x * 255 + 0.5).astype(np.uint8)
  else:
    raise ValueError(f'an array of {x.dtype} is no image')
  if x.shape[-1] in (2, 4):
    return to_rgb(Image.fromarray(x))
  return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:2], 3)))


def _check_range(x: np.ndarray, largest: int) -> None:
  low, high = x.min(), x.max()
  if not 0 <= low <= high <= largest:  # false for NaN, too
    raise ValueError(
      f'pixels of type {x.dtype} should lie within 0 and {largest}, these are '
      f'from {low} to {high}'
    )
