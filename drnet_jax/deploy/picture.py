# SPDX-License-Identifier: Apache-2.0
"""One image of whatever kind, as the crops that the networks are given."""

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from drnet_jax.data import transforms
from drnet_jax.deploy.contract import Contract
from drnet_jax.errors import UserError

# A decoded image is kept for a second crop if it is at most this many times
# the area of the largest crop.
_KEEP = 4


class Picture:
  """An image that is decoded when, and as large as, a crop needs.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array [H, W],
      [H, W, 1], [H, W, 3] or [H, W, 4]; see `as_pixels` for its type.
    contract: of the model.
  """

  def __init__(self, source: Any, contract: Contract):
    self._source = source
    self._contract = contract
    self._decoded: tuple[int, np.ndarray] | None = None  # scale, image
    self._whole_px: int | None = None
    self._crops: dict[int, np.ndarray] = {}

  def crop(self, side_px: int) -> np.ndarray:
    """The central crop.

    Args:
      side_px: of the result. Any side shows the same part of the image.

    Returns:
      uint8 [side_px, side_px, 3].

    Raises:
      UserError: the image cannot be read.
    """
    if side_px not in self._crops:
      self._crops[side_px] = self._cut(side_px)
    return self._crops[side_px]

  def _cut(self, side_px: int) -> np.ndarray:
    short_px = self._contract.short_px(side_px)
    scale = self._scale_for(short_px)
    if self._decoded is None or scale != self._decoded[0]:
      self._decoded = scale, self._decode(short_px)
    image = self._decoded[1]
    largest_px = self._contract.short_px(self._contract.image_px)
    if (
      self._contract.decode == 'full'  # no other crop will be asked for
      or image[..., 0].size > _KEEP * largest_px**2
    ):
      self._decoded = None
    return np.ascontiguousarray(
      transforms.center_crop(image, side_px, resize_px=short_px)
    )

  def _scale_for(self, short_px: int) -> int:
    """By how much a JPEG can be decoded smaller; 1 for all else.

    A picture kept from an earlier crop serves only if it would be decoded
    alike now: what a crop holds must not depend on which others were cut.
    """
    if self._contract.decode == 'full':
      return 1
    if self._whole_px is None:
      self._whole_px = _jpeg_short_px(self._source)
    ratio = self._whole_px // short_px
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(ratio, 1))

  def _decode(self, short_px: int) -> np.ndarray:
    source = _plain(self._source)
    if isinstance(source, str | bytes):
      scaled = self._contract.decode == 'scaled'
      return transforms.decode(source, least_px=short_px if scaled else None)
    if isinstance(source, Image.Image):
      return transforms.to_rgb(ImageOps.exif_transpose(source))
    return as_pixels(np.asarray(source))


def _plain(source: Any) -> Any:
  """Paths as str, buffers as bytes."""
  if isinstance(source, os.PathLike):
    return os.fspath(source)
  if isinstance(source, bytearray | memoryview):
    return bytes(source)
  return source


def _jpeg_short_px(source: Any) -> int:
  """Short side of a JPEG file; 0 for everything else."""
  source = _plain(source)
  if not isinstance(source, str | bytes):
    return 0
  file = io.BytesIO(source) if isinstance(source, bytes) else source
  try:
    with Image.open(file, formats=('JPEG',)) as image:
      return min(image.size)
  except OSError:
    return 0  # not one, or no image at all: decoding will tell


def as_pixels(x: np.ndarray) -> np.ndarray:
  """An array of any type as uint8 [H, W, 3].

  Args:
    x: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha shows white). bool;
      uint8; uint16, of which 65,535 is white; other integers within 0 and 255;
      floats within 0 and 1.

  Raises:
    UserError: anything else, rather than a guess.
  """
  if x.ndim == 2:
    x = x[..., None]
  if x.ndim != 3 or x.shape[-1] not in (1, 3, 4) or 0 in x.shape:
    raise UserError(
      f'an array of shape {list(x.shape)} is no image [H, W], [H, W, 1], '
      '[H, W, 3] or [H, W, 4]'
    )
  if x.dtype == bool:
    x = x * np.uint8(255)
  elif x.dtype == np.uint16:
    x = (x // 257).astype(np.uint8)
  elif np.issubdtype(x.dtype, np.integer):
    _check_range(x, 255)
    x = x.astype(np.uint8)
  elif x.dtype.kind in 'fV':  # bfloat16 is of numpy's kind V
    x = x.astype(np.float32)
    _check_range(x, 1)
    x = np.round(x * 255).astype(np.uint8)
  else:
    raise UserError(f'an array of {x.dtype} is no image')
  if x.shape[-1] == 4:
    return transforms.to_rgb(Image.fromarray(x))
  return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:2], 3)))


def _check_range(x: np.ndarray, largest: int) -> None:
  low, high = x.min(), x.max()
  if not 0 <= low <= high <= largest:  # false for NaN, too
    raise UserError(
      f'pixels of type {x.dtype} should lie within 0 and {largest}, these are '
      f'from {low} to {high}'
    )
