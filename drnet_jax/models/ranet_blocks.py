# SPDX-License-Identifier: Apache-2.0
"""The parts of RANet's network: stem, blocks, exits and their resizing."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from drnet_jax.models import layers

_NARROW = 16  # a layer of fewer channels than this is computed in its own way


@dataclasses.dataclass(frozen=True)
class BlockPlan:
  """Where a block stands and what it does.

  Attributes:
    scale: its sub-network.
    index: its place there.
    layers: how many it has.
    fused: it reads the same block of the sub-network before; a block that does
      not ends in an exit.
    down: its last layer halves the side.
    transition: it ends in a 1x1 convolution that removes channels.
  """

  scale: int
  index: int
  layers: int
  fused: bool
  down: bool
  transition: bool


@struct.dataclass
class Taps:
  """The states of a block: its input, and what it is after each layer.

  A state is the beginning, in channels, of the one after it, so only the last
  is kept; of a block that halves the side at its last layer the last but one
  also.

  Attributes:
    last: [B, H, W, C].
    before: [B, 2H, 2W, C'] or None.
    widths: channels of each state.
  """

  last: jax.Array
  before: jax.Array | None
  widths: tuple[int, ...] = struct.field(pytree_node=False)

  def __getitem__(self, i: int) -> jax.Array:
    is_before = self.before is not None and i < len(self.widths) - 1
    state = self.before if is_before else self.last
    return jax.lax.slice_in_dim(state, 0, self.widths[i], axis=-1)


class Stem(nn.Module):
  """From the image to the base maps, made from the finest to the coarsest.

  Attributes:
    kind: as `ResolutionAdaptiveNetwork.stem`.
    widths: channels of the base maps, coarsest first.
    levels, dtype: as there.
  """

  kind: str
  widths: tuple[int, ...]
  levels: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, ...]:
    unit = partial(_unit, train, self.dtype)
    x, last = x.astype(self.dtype), len(self.widths)
    if self.kind == 'cifar':
      x = unit(x, self.widths[-1], 3, name=f'base{last}')
    else:
      x = nn.Conv(
        self.widths[-1],
        (7, 7),
        (2, 2),
        padding=3,
        dtype=self.dtype,
        name=f'base{last}_conv',
      )(x)
      norm = layers.norm(train, dtype=self.dtype, name=f'base{last}_norm')
      x = MaxPool()(nn.relu(norm(x)))
    maps = [x]
    for s in range(last - 1, 0, -1):
      # One halving, even where the levels differ by more than one.
      stride = 1 if self.levels[s - 1] == self.levels[s] else 2
      x = unit(x, self.widths[s - 1], 3, stride, name=f'base{s}')
      maps.append(x)
    return tuple(reversed(maps))


class Block(nn.Module):
  """Densely connected layers, fused with a coarser block's where planned.

  Attributes:
    plan: what it does.
    growth: channels that a layer adds.
    factor: of its bottlenecks.
    coarser_factor: of the bottlenecks on the coarser maps.
    reduction, compression, dtype: see `ResolutionAdaptiveNetwork`.
  """

  plan: BlockPlan
  growth: int
  factor: int
  coarser_factor: int
  reduction: float
  compression: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, low: Taps | None, *, train: bool
  ) -> tuple[jax.Array, Taps]:
    """Runs the block.

    Args:
      x: [B, H, W, C].
      low: of the coarser block, of a fused one only.
      train: see the network.

    Returns:
      Its output, [B, H, W, C'] or half the side; and its states, before the
      transition.
    """
    plan, unit = self.plan, partial(_unit, train, self.dtype)
    bottleneck = partial(_bottleneck, train, self.dtype)
    theirs = int(self.growth * self.compression) if plan.fused else 0
    width, before, widths = self.growth - theirs, None, [x.shape[-1]]
    for i in range(1, plan.layers + 1):
      stride = 2 if plan.down and i == plan.layers else 1
      if stride == 2:
        before = x
      own = bottleneck(x, width, self.factor, stride=stride, name=f'layer{i}')
      side = own.shape[1:3]
      parts = [resize_aligned(x, side)]
      if plan.fused:
        lent = bottleneck(
          low[i - 1], theirs, self.coarser_factor, name=f'coarser{i}'
        )
        parts.append(resize_aligned(lent, side))
      x = jnp.concatenate([*parts, own], axis=-1)
      widths.append(x.shape[-1])
    taps = Taps(x, before, tuple(widths))
    if plan.fused:
      extra = int(x.shape[-1] * self.compression)
      lent = unit(low[plan.layers], extra, 1, name='coarser_end')
      lent = resize_aligned(lent, x.shape[1:3])
      x = jnp.concatenate([x, lent], axis=-1)
    if plan.transition:
      kept = max(int(x.shape[-1] * self.reduction), 1)
      x = unit(x, kept, 1, name='transition')
    return x, taps


class Exit(nn.Module):
  """Two convolutions of stride 2, the mean of the map, and a dense layer."""

  num_classes: int
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for i in (1, 2):
      x = _unit(train, self.dtype, x, self.width, 3, 2, name=f'unit{i}')
    return nn.Dense(self.num_classes, name='head')(Mean()(x))


# Modules of their own, although without parameters, for `RANet` to count them.


class MaxPool(nn.Module):
  """3x3 of stride 2, padded by one."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return layers.max_pool(x, 3, 2, padding='symmetric')


class Mean(nn.Module):
  """Over the pixels, in float32: the authors' 2x2 average at their sizes."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x.mean((1, 2), dtype=jnp.float32)


def _unit(train, dtype, x, features, kernel, stride=1, *, name):
  """Convolution, norm, ReLU."""
  is_narrow = kernel == 3 and stride == 1 and features < _NARROW
  return layers.conv_norm(
    x,
    features,
    kernel,
    stride,
    train=train,
    padding='symmetric',
    dtype=dtype,
    name=name,
    convolve=layers.narrow_conv if is_narrow else None,
    activation=nn.relu,
  )


def _bottleneck(train, dtype, x, features, factor, *, name, stride=1):
  """1x1 to at most `features * factor` channels, then 3x3 to `features`."""
  inner = min(x.shape[-1], features * factor)
  x = _unit(train, dtype, x, inner, 1, name=f'{name}_inner')
  return _unit(train, dtype, x, features, 3, stride, name=f'{name}_outer')


def resize_aligned(x: jax.Array, side: tuple[int, int]) -> jax.Array:
  """Bilinear resize with the corners' centres aligned and without low-pass.

  PyTorch's align_corners=True, for shrinking too; jax.image.resize aligns the
  pixels' edges.

  Args:
    x: [B, H, W, C].
    side: new H and W.

  Returns:
    [B, *side, C].
  """
  for axis, (old, new) in enumerate(zip(x.shape[1:3], side, strict=True), 1):
    if old == 2 * new > 2:
      x = _halved(x, axis)
    elif old != new:
      weights = jnp.asarray(_aligned_weights(old, new), x.dtype)
      equation = 'ih,bhwc->biwc' if axis == 1 else 'jw,bhwc->bhjc'
      x = jnp.einsum(equation, weights, x, precision='highest')
  return x


def _halved(x: jax.Array, axis: int) -> jax.Array:
  """The same for half of a side, where row i lies between 2i and 2i + 1."""
  half = x.shape[axis] // 2
  share = np.arange(half) / (half - 1)
  others = [i for i in range(x.ndim) if i != axis]
  share = jnp.asarray(np.expand_dims(share, others), x.dtype)
  even = jax.lax.slice_in_dim(x, 0, None, 2, axis)
  odd = jax.lax.slice_in_dim(x, 1, None, 2, axis)
  return even * (1 - share) + odd * share


def _aligned_weights(old: int, new: int) -> np.ndarray:
  """[new, old], rows that add up to 1."""
  at = np.arange(new) * (old - 1) / max(new - 1, 1)
  low = np.floor(at).astype(int)
  high = np.minimum(low + 1, old - 1)
  weights = np.zeros((new, old))
  np.add.at(weights, (np.arange(new), low), 1 - (at - low))
  np.add.at(weights, (np.arange(new), high), at - low)
  return weights
