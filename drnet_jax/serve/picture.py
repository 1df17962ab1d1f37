# SPDX-License-Identifier: Apache-2.0
"""One image of whatever kind, as the crops that the networks are given."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from drnet_jax.data import transforms
from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract, View


class Picture:
  """An image, cut as networks are given it; decoded once for all views.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array [H, W],
      [H, W, 1], [H, W, 3] or [H, W, 4]; see `as_pixels` for its type.
    contract: of the model, for how files are decoded.
  """

  def __init__(self, source: Any, contract: Contract):
    self._source = source
    self._contract = contract
    self._crops: dict[View, np.ndarray] = {}

  def cut(self, views: Iterable[View]) -> None:
    """Decodes the image, and keeps these crops and nothing else of it.

    Raises:
      UserError: the image cannot be read.
    """
    missing = [view for view in views if view not in self._crops]
    image = self._decode() if missing else None
    for view in missing:
      self._crops[view] = np.ascontiguousarray(
        transforms.center_crop(
          image,
          view.side_px,
          resize_px=view.short_px,
          keep_aspect=view.keep_aspect,
        )
      )

  def crop(self, view: View) -> np.ndarray:
    """The central crop, uint8 [side_px, side_px, 3].

    Raises:
      UserError: the image cannot be read.
    """
    self.cut([view])
    return self._crops[view]

  def _decode(self) -> np.ndarray:
    contract, source = self._contract, self._source
    if isinstance(source, os.PathLike):
      source = os.fspath(source)
    if isinstance(source, bytearray | memoryview):
      source = bytes(source)
    if isinstance(source, str | bytes):
      # As large as the most demanding view takes, for all of them at once: most
      # of a JPEG's decoding is its entropy code.
      least_px = transforms.DECODE_MARGIN * contract.decode_px
      scaled = contract.decode == 'scaled'
      return transforms.decode(source, least_px=least_px if scaled else None)
    if isinstance(source, Image.Image):
      return transforms.to_rgb(ImageOps.exif_transpose(source))
    return as_pixels(np.asarray(source))


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
