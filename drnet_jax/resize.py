# SPDX-License-Identifier: Apache-2.0
"""From uint8 pixels to what a network reads, on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def network_view(
  images: jax.Array,
  size_px: int,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  antialias: bool,
) -> jax.Array:
  """Resizes square images bilinearly and normalises them.

  Args:
    images: uint8 [B, H, H, 3], the one crop every candidate size comes from.
    size_px: side of the result.
    mean: per-channel mean of pixels in [0, 1].
    std: per-channel standard deviation of pixels in [0, 1].
    antialias: low-pass before shrinking; must be the same in training,
      evaluation and export.

  Returns:
    float32 [B, size_px, size_px, 3].
  """
  batch, height, _, channels = images.shape
  x = images.astype(jnp.float32)
  if height != size_px:
    x = jax.image.resize(
      x,
      (batch, size_px, size_px, channels),
      method='bilinear',
      antialias=antialias,
    )
  # After resizing: fewer pixels to touch, and both steps are linear.
  return (x / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
