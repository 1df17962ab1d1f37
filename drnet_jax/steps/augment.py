# SPDX-License-Identifier: Apache-2.0
"""Augmentation of a whole batch on the device: mirroring, mixup and cutmix.

Before any size is run, so that all sizes see the same pixels. What is drawn
depends on the step and on an image's place in the global batch, and on nothing
else: not on devices, processes, or where a run was resumed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax.errors import UserError

_STREAM = 2**31  # apart from the keys of steps, whose numbers are smaller


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchAugmentation:
  """What `config.data` says of whole batches.

  Attributes:
    flip: share of the images that are mirrored left to right.
    mixup: alpha of mixup (arXiv:1710.09412): images and labels are blended in
      a share drawn from Beta(alpha, alpha), one for the batch; 0 for none.
    cutmix: alpha of cutmix (arXiv:1905.04899): a box of another image is
      pasted, its area drawn likewise; 0 for none. With both, each batch takes
      one of the two at even odds.
    unlabelled: whether images may be without a label, which is -1.
    num_classes: of the labels.
  """

  flip: float
  mixup: float
  cutmix: float
  unlabelled: bool
  num_classes: int

  @property
  def mixes(self) -> bool:
    """Whether images are mixed, so that labels become distributions."""
    return bool(self.mixup or self.cutmix)

  def check_batch(self, batch_size: int, field: str) -> None:
    """Raises UserError if images cannot be paired."""
    if self.mixes and batch_size % 2:
      raise UserError(
        f'{field} = {batch_size} is odd: config.data.mixup and cutmix pair the '
        'images of a batch'
      )

  def compiled(self, mesh: Mesh):
    """Returns a function (batch, key, step) -> batch on the device.

    Its batch, which it takes over, has 'image' uint8 [B, H, H, 3] and 'label'
    int [B]. It returns images of the same shape and type; the labels become
    float [B, K] if images are mixed or without one, which is then zeros.
    """
    if not (self.flip or self.mixes or self.unlabelled):
      return lambda batch, key, step: batch
    # The images' memory is taken over; the labels change their type.
    augment = jax.jit(
      functools.partial(_augment, self),
      donate_argnums=0,
      out_shardings=mesh_lib.by_batch(mesh),
    )

    def call(batch, key, step):
      images, labels = augment(batch['image'], batch['label'], key, step)
      return batch | {'image': images, 'label': labels}

    return call


def _augment(settings: BatchAugmentation, images, labels, key, step):
  key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), step)
  flip_key, mix_key = jax.random.split(key)
  if settings.flip:
    flipped = jax.random.bernoulli(flip_key, float(settings.flip), labels.shape)
    images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
  if settings.mixes or settings.unlabelled:
    labels = jax.nn.one_hot(labels, settings.num_classes)
  if settings.mixes:
    weight = _weights(settings, mix_key, images.shape[1])
    images = _mix(images, weight[..., None])
    labels = _mix(labels, weight.mean(dtype=float))
  return images, labels


def _weights(settings: BatchAugmentation, key, side_px: int) -> jax.Array:
  """[H, H]: the weight of an image's own pixels, the rest is its partner's."""
  kind_key, share_key, place_key = jax.random.split(key, 3)
  odds = bool(settings.cutmix) / (bool(settings.cutmix) + bool(settings.mixup))
  cut = jax.random.bernoulli(kind_key, odds)
  alpha = jnp.where(cut, settings.cutmix, settings.mixup)
  share = jax.random.beta(share_key, alpha, alpha)

  # A box of the partner's share of the area, cut off at the borders.
  half = side_px * jnp.sqrt(1 - share) / 2
  centre = jax.random.uniform(place_key, (2,), maxval=side_px)
  first, last = jnp.round(centre - half), jnp.round(centre + half)
  place = jnp.arange(side_px)
  inside = (place >= first[:, None]) & (place < last[:, None])  # [2, H]
  box = inside[0][:, None] & inside[1]
  return jnp.where(cut, 1.0 - box, share)


def _mix(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Each element with its partner's, in pairs of neighbours.

  The order is random, so neighbours are a random pairing; and none is sent to
  another device where each has an even number of images.
  """
  pairs = x.reshape(-1, 2, *x.shape[1:])
  partner = pairs[:, ::-1].reshape(x.shape)
  mixed = weight * x + (1 - weight) * partner
  return jnp.round(mixed).astype(x.dtype) if x.dtype == jnp.uint8 else mixed
