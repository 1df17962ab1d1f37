# SPDX-License-Identifier: Apache-2.0
"""One image of whatever kind, as the crops that the networks are given."""

from typing import Any

import numpy as np

from drnet_jax.data import pixels, transforms
from drnet_jax.export.contract import Contract

# A decoded image is kept for a second crop if its area is at most this many
# times that of the largest crop; decoding at 1/2, 1/4 or 1/8 leaves no more.
_KEEP = (2 * transforms.DECODE_MARGIN) ** 2


class Picture:
  """An image that is decoded when a crop is asked for, and cut to any side.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array; see
      `pixels.decode`.
    contract: of the model.
  """

  def __init__(self, source: Any, contract: Contract):
    self._source = source
    self._contract = contract
    self._decoded: np.ndarray | None = None
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
    contract = self._contract
    image = self._decoded
    if image is None:
      image = self._decode()
      largest_px = contract.short_px(contract.image_px)
      # Crops of other sides are asked for only if sizes have their own.
      if contract.decode == 'scaled' and (
        image[..., 0].size <= _KEEP * largest_px**2
      ):
        self._decoded = image
    return np.ascontiguousarray(
      transforms.center_crop(
        image,
        side_px,
        resize_px=contract.short_px(side_px),
        keep_aspect=contract.keep_aspect,
      )
    )

  def _decode(self) -> np.ndarray:
    contract = self._contract
    # Once, as large as the largest size needs: most of a JPEG's decoding is its
    # entropy code, which a second decode would read again.
    least_px = transforms.DECODE_MARGIN * contract.short_px(contract.image_px)
    return pixels.decode(
      self._source, least_px=least_px if contract.decode == 'scaled' else None
    )
