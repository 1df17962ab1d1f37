# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch ResNets of random weights, for comparing speed only."""

import importlib.util

import numpy as np

_BLOCKS = {'resnet50': (3, 4, 6, 3), 'resnet101': (3, 4, 23, 3)}


def is_offered(network: str) -> bool:
  """Whether there is a rival for a network, and PyTorch to run it."""
  return network in _BLOCKS and importlib.util.find_spec('torch') is not None


def create(network: str, num_classes: int):
  """A function from uint8 [B, S, S, 3] to probabilities [B, num_classes].

  Channels last in memory, traced and frozen (norms folded): as fast as PyTorch
  runs it on a CPU without a compiler.
  """
  import torch
  from torch import nn

  def conv(inputs, outputs, kernel, stride):
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))

  class Block(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut."""

    def __init__(self, inputs, width, stride):
      super().__init__()
      self.body = nn.Sequential(
        conv(inputs, width, 1, 1),
        nn.ReLU(),
        conv(width, width, 3, stride),
        nn.ReLU(),
        conv(width, 4 * width, 1, 1),
      )
      same = stride == 1 and inputs == 4 * width
      self.shortcut = (
        nn.Identity() if same else conv(inputs, 4 * width, 1, stride)
      )

    def forward(self, x):
      return torch.relu(self.body(x) + self.shortcut(x))

  layers = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
  inputs = 64
  for i, blocks in enumerate(_BLOCKS[network]):
    for j in range(blocks):
      stride = 2 if i and not j else 1
      layers.append(Block(inputs, 64 * 2**i, stride))
      inputs = 256 * 2**i
  layers += [
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(inputs, num_classes),
    nn.Softmax(-1),
  ]
  module = nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)
  example = torch.zeros(1, 3, 64, 64).to(memory_format=torch.channels_last)
  with torch.inference_mode():
    module = torch.jit.freeze(torch.jit.trace(module, example))

  def run(images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      # Channels last already; the permutation only says so.
      x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
      return module(x).numpy()

  return run
