# SPDX-License-Identifier: Apache-2.0
"""MobileNetV4, the convolutional ones (arXiv:2404.10518), in Linen."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax

from drnet_jax import settings
from drnet_jax.models import layers


class Conv(NamedTuple):
  """A convolution, its norm and ReLU."""

  kernel: int
  stride: int
  features: int


class Fused(NamedTuple):
  """A convolution that expands, and a 1x1 projection."""

  kernel: int
  stride: int
  expansion: int
  features: int


class Inverted(NamedTuple):
  """The universal inverted bottleneck.

  A depthwise convolution of side `start`, a 1x1 expansion, one of side `middle`
  and a 1x1 projection; a side of 0 has none. The stride is in the later one.
  """

  start: int
  middle: int
  stride: int
  expansion: int
  features: int


# Tables 11 and 12.
SMALL = (
  (Conv(3, 2, 32), Conv(1, 1, 32)),
  (Conv(3, 2, 96), Conv(1, 1, 64)),
  (
    Inverted(5, 5, 2, 3, 96),
    *4 * (Inverted(0, 3, 1, 2, 96),),
    Inverted(3, 0, 1, 4, 96),
  ),
  (
    Inverted(3, 3, 2, 6, 128),
    Inverted(5, 5, 1, 4, 128),
    Inverted(0, 5, 1, 4, 128),
    Inverted(0, 5, 1, 3, 128),
    *2 * (Inverted(0, 3, 1, 4, 128),),
  ),
  (Conv(1, 1, 960),),
)
MEDIUM = (
  (Fused(3, 2, 4, 48),),
  (Inverted(3, 5, 2, 4, 80), Inverted(3, 3, 1, 2, 80)),
  (
    Inverted(3, 5, 2, 6, 160),
    *2 * (Inverted(3, 3, 1, 4, 160),),
    Inverted(3, 5, 1, 4, 160),
    Inverted(3, 3, 1, 4, 160),
    Inverted(3, 0, 1, 4, 160),
    Inverted(0, 0, 1, 2, 160),
    Inverted(3, 0, 1, 4, 160),
  ),
  (
    Inverted(5, 5, 2, 6, 256),
    Inverted(5, 5, 1, 4, 256),
    *2 * (Inverted(3, 5, 1, 4, 256),),
    Inverted(0, 0, 1, 4, 256),
    Inverted(3, 0, 1, 4, 256),
    Inverted(3, 5, 1, 2, 256),
    Inverted(5, 5, 1, 4, 256),
    *2 * (Inverted(0, 0, 1, 4, 256),),
    Inverted(5, 0, 1, 2, 256),
  ),
  (Conv(1, 1, 960),),
)


class MobileNetV4(nn.Module):
  """MobileNetV4 from [B, H, W, 3] to logits [B, K].

  Attributes:
    num_classes: K.
    stages: for each stage its blocks.
    dropout: before the classifier, in training.
    padding, dtype: see `layers`.
  """

  num_classes: int
  stages: Sequence[Sequence[Conv | Fused | Inverted]]
  dropout: settings.BelowOne = 0.2
  padding: layers.Padding = 'symmetric'
  dtype: layers.DType = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv_norm = partial(
      layers.conv_norm,
      train=train,
      padding=self.padding,
      dtype=self.dtype,
      activation=nn.relu,
    )
    x = conv_norm(x.astype(self.dtype), 32, 3, 2, name='stem')
    for i, blocks in enumerate(self.stages, 1):
      for j, block in enumerate(blocks, 1):
        x = _run(block, x, f'stage{i}_block{j}', conv_norm)
    # Pooled before its last convolution, which so costs next to nothing.
    x = x.mean((1, 2), keepdims=True)
    x = conv_norm(x, 1280, 1, name='head')
    return layers.pool_and_classify(x, self.num_classes, self.dropout, train)


def _run(block, x: jax.Array, name: str, conv_norm) -> jax.Array:
  """One block of the tables, within the network's own scope."""
  features, stride = block.features, block.stride
  if isinstance(block, Conv):
    return conv_norm(x, features, block.kernel, stride, name=name)
  hidden, y = x.shape[-1] * block.expansion, x
  if isinstance(block, Fused):
    y = conv_norm(y, hidden, block.kernel, stride, name=f'{name}_expand')
  else:
    if block.start:
      y = conv_norm(
        y,
        x.shape[-1],
        block.start,
        1 if block.middle else stride,
        groups=x.shape[-1],
        name=f'{name}_start',
        activation=None,
      )
    y = conv_norm(y, hidden, 1, name=f'{name}_expand')
    if block.middle:
      y = conv_norm(
        y, hidden, block.middle, stride, groups=hidden, name=f'{name}_middle'
      )
  y = conv_norm(y, features, 1, name=f'{name}_project', activation=None)
  return x + y if y.shape == x.shape else y


NETWORKS = {
  'mobilenetv4_conv_small': partial(MobileNetV4, stages=SMALL),
  'mobilenetv4_conv_medium': partial(MobileNetV4, stages=MEDIUM),
}
