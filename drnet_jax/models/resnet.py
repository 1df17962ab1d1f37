# SPDX-License-Identifier: Apache-2.0
"""Residual networks (arXiv:1512.03385; v1.5: stride in the 3x3), in Linen."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from drnet_jax import settings
from drnet_jax.models import layers


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut; fields are as `ResNet` sets them."""

  features: int
  stride: int
  zero_init: bool
  pooled: bool
  padding: str
  dtype: Any

  @property
  def convolutions(self) -> tuple[tuple[int, int, int], ...]:
    """(channels, kernel, stride) of each."""
    return (self.features, 3, self.stride), (self.features, 3, 1)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv = partial(layers.conv, padding=self.padding, dtype=self.dtype)
    norm = partial(layers.norm, train, dtype=self.dtype)
    init, last = nn.initializers, len(self.convolutions)
    y = x
    for i, shape in enumerate(self.convolutions, 1):
      scale_init = init.zeros if self.zero_init and i == last else init.ones
      y = conv(*shape, name=f'conv{i}')(y)
      y = norm(name=f'norm{i}', scale_init=scale_init)(y)
      if i < last:
        y = nn.relu(y)
    stride = self.stride
    if stride != 1 or x.shape != y.shape:
      if self.pooled and stride != 1:
        # Of an odd side the last pixel is a mean of its own, as in timm.
        window = (stride, stride)
        x = nn.avg_pool(x, window, window, 'SAME', count_include_pad=False)
        stride = 1
      x = conv(y.shape[-1], 1, stride, name='shortcut_conv')(x)
      x = norm(name='shortcut_norm')(x)
    return nn.relu(x + y)


class BottleneckBlock(BasicBlock):
  """1x1, 3x3, 1x1 convolutions and a shortcut."""

  @property
  def convolutions(self) -> tuple[tuple[int, int, int], ...]:
    return (
      (self.features, 1, 1),
      (self.features, 3, self.stride),
      (4 * self.features, 1, 1),
    )


class ResNet(nn.Module):
  """A residual network from [B, H, W, 3] to logits [B, K].

  Attributes:
    num_classes: K.
    stage_sizes: blocks in each stage; the side halves and the width doubles
      from one stage to the next.
    block: BasicBlock or BottleneckBlock.
    width: channels of the first stage (before a bottleneck's expansion).
    stem: 'imagenet' (7x7 of stride 2, then a 3x3 max-pool of stride 2), 'deep'
      (ResNet-D, arXiv:1812.01187: three 3x3 in place of the 7x7; shortcuts
      shrink by a mean, not by skipping pixels), 'cifar' (3x3 of stride 1), or
      'patch' (non-overlapping patches).
    patch_px: side of a patch, for the 'patch' stem.
    zero_init: start the last norm of each block at 0, so that the block starts
      as its shortcut (torchvision's zero_init_residual).
    padding, dtype: see `layers`.
  """

  num_classes: int
  stage_sizes: Sequence[settings.Whole]
  block: type[nn.Module]
  width: settings.Natural = 64
  stem: Literal['imagenet', 'deep', 'cifar', 'patch'] = 'imagenet'
  patch_px: settings.Pixels = 4
  zero_init: bool = False
  padding: layers.Padding = 'symmetric'
  dtype: layers.DType = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = self._stem(x.astype(self.dtype), train)
    for i, blocks in enumerate(self.stage_sizes):
      for j in range(blocks):
        x = self.block(
          features=self.width * 2**i,
          stride=2 if i > 0 and j == 0 else 1,
          zero_init=self.zero_init,
          pooled=self.stem == 'deep',
          padding=self.padding,
          dtype=self.dtype,
          name=f'stage{i + 1}_block{j + 1}',
        )(x, train=train)
    return layers.pool_and_classify(x, self.num_classes)

  def _stem(self, x: jax.Array, train: bool) -> jax.Array:
    stem = partial(
      layers.conv_norm,
      train=train,
      padding=self.padding,
      dtype=self.dtype,
      activation=nn.relu,
    )
    if self.stem == 'deep':
      x = stem(x, self.width // 2, 3, 2, name='stem1')
      x = stem(x, self.width // 2, 3, name='stem2')
      x = stem(x, self.width, 3, name='stem')
      return layers.max_pool(x, 3, 2, padding=self.padding)
    stem = partial(stem, name='stem')
    if self.stem == 'imagenet':
      x = stem(x, self.width, 7, 2)
      return layers.max_pool(x, 3, 2, padding=self.padding)
    if self.stem == 'cifar':
      return stem(x, self.width, 3)
    if self.stem == 'patch':
      # A convolution of patch_px x patch_px and as much stride, written as a
      # matrix product: at 3 input channels XLA's CPU convolution is slower.
      x = nn.Dense(
        self.width, use_bias=False, dtype=self.dtype, name='stem_patch'
      )(_space_to_depth(x, self.patch_px))
      return nn.relu(layers.norm(train, dtype=self.dtype, name='stem_norm')(x))
    raise ValueError(
      f"stem {self.stem!r} is not 'imagenet', 'deep', 'cifar', 'patch'"
    )


def _space_to_depth(x: jax.Array, block: int) -> jax.Array:
  """[B, H, W, C] -> [B, ceil(H/block), ceil(W/block), block^2 C]."""
  pad_h, pad_w = -x.shape[1] % block, -x.shape[2] % block
  x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
  b, h, w, c = x.shape
  x = x.reshape(b, h // block, block, w // block, block, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h // block, w // block, block * block * c)


_basic = partial(ResNet, block=BasicBlock)
_bottleneck = partial(ResNet, block=BottleneckBlock)
NETWORKS = {
  'resnet': _basic,
  'resnet10': partial(_basic, stage_sizes=(1, 1, 1, 1)),
  'resnet18': partial(_basic, stage_sizes=(2, 2, 2, 2)),
  'resnet34': partial(_basic, stage_sizes=(3, 4, 6, 3)),
  'resnet50': partial(_bottleneck, stage_sizes=(3, 4, 6, 3)),
  'resnet101': partial(_bottleneck, stage_sizes=(3, 4, 23, 3)),
  'resnet152': partial(_bottleneck, stage_sizes=(3, 8, 36, 3)),
}
NETWORKS |= {
  f'resnet{depth}d': partial(NETWORKS[f'resnet{depth}'], stem='deep')
  for depth in (18, 34, 50, 101, 152)
}
