# SPDX-License-Identifier: Apache-2.0
"""What others would do: plain ResNets of PyTorch, and OpenVINO as it comes."""

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from drnet_jax.export.contract import Contract
from drnet_jax.serve import openvino

_BLOCKS = {'resnet50': (3, 4, 6, 3), 'resnet101': (3, 4, 23, 3)}


class PlainOpenVino:
  """The graphs of `package.write_onnx`, run as OpenVINO's first page shows."""

  def __init__(self, folder: str, contract: Contract, precision: str):
    self._precision = precision
    self._models = [
      openvino.core().read_model(os.path.join(folder, f'{name}.onnx'))
      for name in contract.programs
    ]
    self._compiled = [self._compile(model, 'LATENCY') for model in self._models]

  def run(self, option: int, inputs: np.ndarray) -> tuple[np.ndarray, None]:
    """As an engine: probabilities [B, K] of uint8 [B, S, S, 3]."""
    return self._compiled[option](inputs)[0], None

  def singly(self, option: int, crops: Iterable[np.ndarray]) -> None:
    """Runs crops, uint8 [S, S, 3], one after another."""
    for crop in crops:
      self.run(option, crop[None])

  def in_bulk(self, option: int, batch: int) -> Callable[[Sequence], list]:
    """From crops, uint8 [S, S, 3], to probabilities of batches.

    By a queue of as many requests as OpenVINO thinks best.
    """
    import openvino as runtime

    compiled = self._compile(self._models[option], 'THROUGHPUT')
    queue = runtime.AsyncInferQueue(compiled)
    found: dict[int, np.ndarray] = {}

    def keep(request: Any, place: int) -> None:
      found[place] = request.get_output_tensor(0).data.copy()

    def run(crops: Sequence[np.ndarray]) -> list[np.ndarray]:
      for i in range(0, len(crops), batch):
        queue.start_async({0: np.stack(crops[i : i + batch])}, i)
      queue.wait_all()
      return [found[i] for i in range(0, len(crops), batch)]

    queue.set_callback(keep)
    return run

  def _compile(self, model: Any, hint: str) -> Any:
    settings = {
      'PERFORMANCE_HINT': hint,
      'INFERENCE_PRECISION_HINT': self._precision,
    }
    return openvino.core().compile_model(model, 'CPU', settings)


def is_offered(network: str) -> bool:
  """Whether there are rivals for a network, and PyTorch to make them."""
  return network in _BLOCKS and importlib.util.find_spec('torch') is not None


def in_torch(network: str, num_classes: int) -> Callable:
  """The network in PyTorch: uint8 [B, S, S, 3] to probabilities [B, K].

  Channels last in memory, norms folded. On a CPU traced and frozen: as fast as
  PyTorch runs it there without a compiler. On a GPU, where there is one, in
  bfloat16, compiled, and started as a CUDA graph.
  """
  import torch
  from torch.fx.experimental import optimization

  where = device()
  dtype = torch.float32 if where == 'cpu' else torch.bfloat16
  with torch.inference_mode():
    module = _module(network, num_classes, dtype).to(where)
    if where == 'cpu':
      example = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
      module = torch.jit.freeze(torch.jit.trace(module, example))
    else:
      module = optimization.fuse(module).to(dtype)
      module = torch.compile(module, mode='reduce-overhead')

  def run(images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      found = module(torch.from_numpy(images).to(where))
      return found.float().cpu().numpy()

  return run


def training_steps(
  network: str, num_classes: int, batch_size: int, steps: int
) -> Callable[[], None]:
  """A job: so many training steps, on the same images of 224 px each time.

  Channels last, compiled, bfloat16 on a GPU, SGD with momentum.
  """
  import torch

  where = device()
  module = _module(network, num_classes, torch.float32, probabilities=False)
  module = module.train().to(where)
  optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
  loss_fn = torch.nn.CrossEntropyLoss()
  shape = (batch_size, 224, 224, 3)
  images = torch.randint(0, 256, shape, dtype=torch.uint8, device=where)
  labels = torch.arange(batch_size, device=where) % num_classes
  compiled = torch.compile(module)

  def run() -> None:
    for _ in range(steps):
      optimizer.zero_grad(set_to_none=True)
      with torch.autocast(where, torch.bfloat16, enabled=where != 'cpu'):
        loss = loss_fn(compiled(images), labels)
      loss.backward()
      optimizer.step()
    if where != 'cpu':
      torch.cuda.synchronize()

  return run


def device() -> str:
  """Where PyTorch runs: 'cuda' or 'cpu'."""
  import torch

  return 'cuda' if torch.cuda.is_available() else 'cpu'


def free() -> None:
  """Gives back memory of a GPU that PyTorch keeps for later."""
  if torch := sys.modules.get('torch'):
    gc.collect()  # what it compiled refers to itself
    torch.cuda.empty_cache()


def _module(
  network: str, num_classes: int, dtype: Any, *, probabilities: bool = True
):
  """From uint8 [B, S, S, 3] to probabilities, or logits; for evaluation.

  `dtype` is that of the pixels; the weights are in float32.
  """
  import torch
  from torch import nn

  class Pixels(nn.Module):
    """To floating point; channels last already, the permutation says so."""

    def forward(self, images):
      return images.permute(0, 3, 1, 2).to(dtype) / 255

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
      self.shortcut = nn.Identity()
      if inputs != 4 * width:  # the first of a stage
        self.shortcut = conv(inputs, 4 * width, 1, stride)

    def forward(self, x):
      return torch.relu(self.body(x) + self.shortcut(x))

  layers = [Pixels(), conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
  inputs = 64
  for i, blocks in enumerate(_BLOCKS[network]):
    for j in range(blocks):
      layers.append(Block(inputs, 64 * 2**i, 2 if i and not j else 1))
      inputs = 256 * 2**i
  layers += [
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(inputs, num_classes),
    nn.Softmax(-1) if probabilities else nn.Identity(),
  ]
  return nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)
