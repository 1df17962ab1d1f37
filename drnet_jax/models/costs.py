# SPDX-License-Identifier: Apache-2.0
"""What an image costs a model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Macs:
  """Multiply-adds per image, of each option and of the predictor.

  Attributes:
    sizes: of the base network at each size; of a network with exits, up to each
      exit.
    predictor: 0 without one.
  """

  sizes: tuple[int, ...]
  predictor: int

  @property
  def gmacs(self) -> tuple[float, ...]:
    """`sizes`, in 1e9 multiply-adds."""
    return tuple(macs / 1e9 for macs in self.sizes)
