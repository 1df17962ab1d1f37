# SPDX-License-Identifier: Apache-2.0
"""One image of whatever kind, as the crops that the networks are given."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from drnet_jax.data import pixels, transforms
from drnet_jax.export.contract import Contract, View

_LITTLE = 2  # times as many bytes as a crop, that it may keep in memory


class Picture:
  """An image, cut as networks are given it; decoded once for all views.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array; see
      `pixels.decode`.
    contract: of the model, for how files are decoded.
  """

  def __init__(self, source: Any, contract: Contract):
    self._source = source
    self._contract = contract
    self._crops: dict[View, np.ndarray] = {}

  def cut(self, views: Iterable[View]) -> None:
    """Decodes the image once and keeps these crops, not the decoded image.

    Raises:
      UserError: the image cannot be read.
    """
    missing = [view for view in views if view not in self._crops]
    if not missing:
      return
    # As large as the most demanding view takes, for all of them at once: most
    # of a JPEG's decoding is its entropy code.
    least_px = transforms.DECODE_MARGIN * self._contract.decode_px
    scaled = self._contract.decode == 'scaled'
    image = pixels.decode(self._source, least_px=least_px if scaled else None)
    for view in missing:
      crop = transforms.center_crop(
        image,
        view.side_px,
        resize_px=view.short_px,
        keep_aspect=view.keep_aspect,
      )
      # The decoded image is ours alone, and new memory is slow to fill: what is
      # little larger is kept, and not copied.
      if crop.base is not None and crop.base.nbytes > _LITTLE * crop.nbytes:
        crop = crop.copy()
      self._crops[view] = crop

  def crop(self, view: View) -> np.ndarray:
    """The central crop, uint8 [side_px, side_px, 3].

    Raises:
      UserError: the image cannot be read.
    """
    self.cut([view])
    return self._crops[view]
