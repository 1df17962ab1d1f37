# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 (arXiv:1801.04381) and its block, in Linen."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drnet_jax import settings
from drnet_jax.models import layers


class InvertedResidual(nn.Module):
  """1x1 expansion, depthwise convolution, 1x1 projection, and a shortcut.

  Attributes:
    features: channels of the result.
    expansion: channels in between, as a multiple of the input's; 1 has no
      expanding convolution.
    stride: of the depthwise convolution.
    activation: after all but the projection.
    padding, epsilon, dtype: as `MobileNetV2`'s.
    kernel: side of the depthwise convolution.
    squeeze: channels that squeeze-and-excitation squeezes to; 0 for none.
    drop: chance that the block is its shortcut, per image, in training.
  """

  features: int
  expansion: int
  stride: int
  activation: Callable[[jax.Array], jax.Array]
  padding: str
  epsilon: float
  dtype: Any
  kernel: int = 3
  squeeze: int = 0
  drop: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv_norm = partial(
      layers.conv_norm,
      train=train,
      padding=self.padding,
      epsilon=self.epsilon,
      dtype=self.dtype,
      activation=self.activation,
    )
    hidden, y = x.shape[-1] * self.expansion, x
    if self.expansion != 1:
      y = conv_norm(y, hidden, 1, name='expand')
    y = conv_norm(
      y, hidden, self.kernel, self.stride, groups=hidden, name='depthwise'
    )
    if self.squeeze:
      # Summed in float32; the dense layer casts it to its own dtype.
      gate = y.mean((1, 2), dtype=jnp.float32)
      gate = nn.Dense(self.squeeze, dtype=self.dtype, name='squeeze')(gate)
      gate = self.activation(gate)
      gate = nn.Dense(hidden, dtype=self.dtype, name='excite')(gate)
      y = y * nn.sigmoid(gate)[:, None, None, :]
    y = conv_norm(y, self.features, 1, name='project', activation=None)
    if self.stride != 1 or x.shape[-1] != self.features:
      return y
    if self.drop:
      # Stochastic depth: one draw per image, over all of its values.
      y = nn.Dropout(self.drop, broadcast_dims=(1, 2, 3))(
        y, deterministic=not train
      )
    return x + y


class MobileNetV2(nn.Module):
  """MobileNetV2 from [B, H, W, 3] to logits [B, K].

  Attributes:
    num_classes: K.
    width: multiplies all channels; the last layer's only if above 1.
    stem: channels of the first convolution, before `width`.
    stages: for each stage (expansion, channels, blocks, stride), Table 2.
    head: channels of the last convolution.
    dropout: before the classifier, in training.
    padding, dtype: see `layers`.
    epsilon: of the norms; Keras has 1e-3.
  """

  num_classes: int
  width: settings.Positive = 1.0
  stem: settings.Natural = 32
  stages: Sequence[Sequence[settings.Natural]] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
  )
  head: settings.Natural = 1280
  dropout: settings.BelowOne = 0.2
  padding: layers.Padding = 'symmetric'
  epsilon: settings.Positive = 1e-5
  dtype: layers.DType = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    how = {
      'activation': nn.relu6,
      'padding': self.padding,
      'epsilon': self.epsilon,
      'dtype': self.dtype,
    }
    conv_norm = partial(layers.conv_norm, train=train, **how)
    stem = layers.round_channels(self.stem * self.width)
    x = conv_norm(x.astype(self.dtype), stem, 3, 2, name='stem')
    for i, (expansion, channels, blocks, stride) in enumerate(self.stages, 1):
      for j in range(blocks):
        x = InvertedResidual(
          features=layers.round_channels(channels * self.width),
          expansion=expansion,
          stride=stride if j == 0 else 1,
          name=f'stage{i}_block{j + 1}',
          **how,
        )(x, train=train)
    head = layers.round_channels(self.head * max(1.0, self.width))
    x = conv_norm(x, head, 1, name='head')
    return layers.pool_and_classify(x, self.num_classes, self.dropout, train)


NETWORKS = {
  'mobilenet_v2': MobileNetV2,
  # Predictor for a dynamic MobileNetV2: four stages of one inverted residual
  # block. The paper gives only its block, its input (64 px) and a total of
  # 3.8 M parameters; this one has 0.25 M and takes 4.7 M multiply-adds.
  'inverted_residual4': partial(
    MobileNetV2,
    stem=16,
    stages=((3, 24, 1, 2), (4, 40, 1, 2), (6, 80, 1, 2), (6, 160, 1, 2)),
    head=512,
    dropout=0.0,
  ),
}
