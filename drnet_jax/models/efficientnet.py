# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-B0 to B4 and Lite 0 to 4 (arXiv:1905.11946), in Linen."""

import math
from functools import partial

import flax.linen as nn
import jax

from drnet_jax import settings
from drnet_jax.models import layers
from drnet_jax.models.mobilenet_v2 import InvertedResidual

# (expansion, channels, blocks, stride, kernel) of B0, Table 1.
_STAGES = (
  (1, 16, 1, 1, 3),
  (6, 24, 2, 2, 3),
  (6, 40, 2, 2, 5),
  (6, 80, 3, 2, 3),
  (6, 112, 3, 1, 5),
  (6, 192, 4, 2, 5),
  (6, 320, 1, 1, 3),
)


class EfficientNet(nn.Module):
  """EfficientNet from [B, H, W, 3] to logits [B, K].

  Attributes:
    num_classes: K.
    width: multiplies B0's channels.
    depth: multiplies B0's blocks.
    lite: for phones: no squeeze-and-excitation, ReLU6; stem, head, and the
      number of blocks of the first and last stage stay B0's.
    dropout: before the classifier, in training.
    drop: chance of a block to be its shortcut, in training: for block i of n,
      counted from 0, i / n times this.
    padding, dtype: see `layers`.
    epsilon: of the norms; TensorFlow's weights have 1e-3.
  """

  num_classes: int
  width: settings.Positive = 1.0
  depth: settings.Positive = 1.0
  lite: bool = False
  dropout: settings.BelowOne = 0.2
  drop: settings.BelowOne = 0.2
  padding: layers.Padding = 'symmetric'
  epsilon: settings.Positive = 1e-5
  dtype: layers.DType = 'float32'

  @property
  def stages(self) -> tuple[tuple[int, int, int, int, int], ...]:
    """(expansion, channels, blocks, stride, kernel) of each stage."""
    found = []
    for stage in _STAGES:
      expansion, channels, blocks, stride, kernel = stage
      channels = layers.round_channels(channels * self.width)
      if not (self.lite and stage in (_STAGES[0], _STAGES[-1])):
        blocks = math.ceil(blocks * self.depth)
      found.append((expansion, channels, blocks, stride, kernel))
    return tuple(found)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    how = {
      'activation': nn.relu6 if self.lite else nn.silu,
      'padding': self.padding,
      'epsilon': self.epsilon,
      'dtype': self.dtype,
    }
    conv_norm = partial(layers.conv_norm, train=train, **how)
    stem = 32 if self.lite else layers.round_channels(32 * self.width)
    x = conv_norm(x.astype(self.dtype), stem, 3, 2, name='stem')
    done, total = 0, sum(blocks for _, _, blocks, _, _ in self.stages)
    for i, stage in enumerate(self.stages, 1):
      expansion, channels, blocks, stride, kernel = stage
      for j in range(blocks):
        x = InvertedResidual(
          features=channels,
          expansion=expansion,
          kernel=kernel,
          stride=stride if j == 0 else 1,
          squeeze=0 if self.lite else max(1, x.shape[-1] // 4),
          drop=self.drop * done / total,
          name=f'stage{i}_block{j + 1}',
          **how,
        )(x, train=train)
        done += 1
    head = 1280 if self.lite else 4 * x.shape[-1]
    x = conv_norm(x, head, 1, name='head')
    return layers.pool_and_classify(x, self.num_classes, self.dropout, train)


NETWORKS = {
  'efficientnet_b0': partial(EfficientNet, width=1.0, depth=1.0, dropout=0.2),
  'efficientnet_b1': partial(EfficientNet, width=1.0, depth=1.1, dropout=0.2),
  'efficientnet_b2': partial(EfficientNet, width=1.1, depth=1.2, dropout=0.3),
  'efficientnet_b3': partial(EfficientNet, width=1.2, depth=1.4, dropout=0.3),
  'efficientnet_b4': partial(EfficientNet, width=1.4, depth=1.8, dropout=0.4),
}
NETWORKS |= {
  name.replace('_b', '_lite'): partial(
    network, lite=True, dropout=min(network.keywords['dropout'], 0.3)
  )
  for name, network in NETWORKS.items()
}
