# SPDX-License-Identifier: Apache-2.0
"""What PyTorch says of weights and images that anyone can draw again.

    python tests/torch_golden.py          (needs torch, torchvision and timm)

writes golden/torch.npz: for torchvision's and timm's own networks the names and
shapes of their weights, parameters, multiply-adds, and the logits of two images
at several sizes. Weights and images are drawn by NumPy from their names alone,
so that the tests need no PyTorch. With DRNET_JAX_DATA (../shared/data), the
logits of its real weights on four of its photographs are written to
golden/torch_real.npz as well; neither weights nor images are.
"""

import json
import os
import pathlib
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / 'golden'
DATA = pathlib.Path(
  os.environ.get(
    'DRNET_JAX_DATA', pathlib.Path(__file__).parents[2] / 'shared' / 'data'
  )
)
NUM_CLASSES = 10

# Sizes in px: the paper's candidates, and odd ones; of the variants of a family
# an odd one.
_SIZES = (97, 112, 135, 168, 196, 224)
_SHORT = (97,)
# Our name, naming, their name, their arguments, sizes.
NETWORKS = [
  ('resnet18', 'torchvision', 'resnet18', {}, _SHORT),
  ('resnet34', 'torchvision', 'resnet34', {}, _SHORT),
  ('resnet50', 'torchvision', 'resnet50', {}, _SIZES),
  ('resnet50', 'timm', 'resnet50', {}, _SHORT),
  ('resnet101', 'torchvision', 'resnet101', {}, _SHORT),
  ('resnet152', 'torchvision', 'resnet152', {}, _SHORT),
  *(
    (f'resnet{depth}d', 'timm', f'resnet{depth}d', {}, _SHORT)
    for depth in (18, 34, 50, 101, 152)
  ),
  ('mobilenet_v2', 'torchvision', 'mobilenet_v2', {}, _SIZES),
  ('mobilenet_v2', 'timm', 'mobilenetv2_100', {}, _SHORT),
  (
    'mobilenet_v2 width=0.75',
    'torchvision',
    'mobilenet_v2',
    {'width_mult': 0.75},
    _SHORT,
  ),
  ('mobilenet_v2 width=1.4', 'timm', 'mobilenetv2_140', {}, _SHORT),
  ('efficientnet_b0', 'torchvision', 'efficientnet_b0', {}, _SIZES),
  ('efficientnet_b0', 'timm', 'efficientnet_b0', {}, _SHORT),
  ('efficientnet_b1', 'torchvision', 'efficientnet_b1', {}, _SHORT),
  ('efficientnet_b2', 'torchvision', 'efficientnet_b2', {}, _SHORT),
  ('efficientnet_b3', 'timm', 'efficientnet_b3', {}, _SHORT),
  ('efficientnet_b4', 'torchvision', 'efficientnet_b4', {}, _SHORT),
  (
    'efficientnet_b0 padding=same epsilon=0.001',
    'timm',
    'tf_efficientnet_b0',
    {},
    _SIZES,
  ),
  *(
    (f'efficientnet_lite{i}', 'timm', f'efficientnet_lite{i}', {}, _SHORT)
    for i in range(5)
  ),
  *(
    (name, 'timm', name, {}, _SIZES)
    for name in ('mobilenetv4_conv_small', 'mobilenetv4_conv_medium')
  ),
]

# File, network, padding, mean and standard deviation. data/README.md there.
REAL = [
  (
    'resnet50_pqf_large_imagenet',
    'resnet50',
    'symmetric',
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
  ),
  (
    'mobilenet_v2_1.0_tf2ptq_imagenet',
    'mobilenet_v2',
    'same',
    (0.5, 0.5, 0.5),
    (0.5, 0.5, 0.5),
  ),
]
REAL_SIZES = (96, 112, 128, 160, 168, 192, 224)
REAL_IMAGES = 4


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Weights drawn from each tensor's name.

  Scaled so that the signal neither dies nor grows through 150 layers: else
  rounding grows with it.
  """
  state = {}
  for name, shape in shapes.items():
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith('running_var'):
      x = rng.uniform(0.5, 1.5, shape)
    elif name.endswith('weight') and len(shape) == 1:
      x = rng.uniform(0.5, 1.0, shape)
    elif len(shape) == 1:
      x = 0.1 * rng.standard_normal(shape)
    else:
      x = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
      if shape[1] == 1:
        x *= 2  # depthwise: makes up for what squeeze-and-excitation takes
    state[name] = x.astype(np.float32)
  return state


def random_images(size_px: int) -> np.ndarray:
  """Two normalised images, float32 [2, size_px, size_px, 3]."""
  rng = np.random.default_rng(size_px)
  return rng.standard_normal((2, size_px, size_px, 3)).astype(np.float32)


def real_images(size_px: int, mean, std) -> np.ndarray:
  """Photographs squashed to a square and normalised, float32."""
  from drnet_jax.data import pixels, sources, transforms

  path = str(DATA / 'imagenet_val1300_227.npz')
  source = sources.load('packed', f'val[:{REAL_IMAGES}]', data_dir=path)
  images = np.stack(
    [
      transforms.resize(
        pixels.decode(source.examples[i]['image']), size_px, size_px
      )
      for i in range(REAL_IMAGES)
    ]
  )
  return ((images / 255.0 - mean) / std).astype(np.float32)


def _torch_logits(network, images: np.ndarray) -> np.ndarray:
  import torch

  with torch.no_grad():
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return network.eval()(x).numpy()


def _count_macs(network, size_px: int) -> int:
  import torch

  total = 0

  def count(module, _, out):
    nonlocal total
    if isinstance(module, torch.nn.Conv2d):
      total += out[0].numel() * module.weight[0].numel()
    else:
      total += module.weight.numel()

  hooks = [
    m.register_forward_hook(count)
    for m in network.modules()
    if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
  ]
  _torch_logits(network, random_images(size_px)[:1])
  for hook in hooks:
    hook.remove()
  return total


def _shapes(network) -> dict[str, tuple[int, ...]]:
  return {
    name: tuple(x.shape)
    for name, x in network.state_dict().items()
    if not name.endswith('num_batches_tracked')
  }


def _load(network, state) -> None:
  import torch

  tensors = {name: torch.from_numpy(x) for name, x in state.items()}
  network.load_state_dict(tensors, strict=True)


def _pad_as_tensorflow(network) -> None:
  """Gives every strided or padded convolution TensorFlow's SAME padding."""
  import torch

  def pad(module, inputs):
    (x,) = inputs
    pads = []
    for size, k, s in zip(
      x.shape[:-3:-1], module.kernel_size, module.stride, strict=True
    ):
      total = max((-(-size // s) - 1) * s + k - size, 0)
      pads += [total // 2, total - total // 2]
    return (torch.nn.functional.pad(x, pads),)

  for module in network.modules():
    if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
      module.padding = (0, 0)
      module.register_forward_pre_hook(pad)


def main() -> None:
  import timm
  import torch
  import torchvision

  arrays, facts = {}, {}
  for ours, naming, theirs, arguments, sizes in NETWORKS:
    if naming == 'timm':
      network = timm.create_model(theirs, num_classes=NUM_CLASSES, **arguments)
    else:
      make = getattr(torchvision.models, theirs)
      network = make(num_classes=NUM_CLASSES, **arguments)
    shapes = _shapes(network)
    _load(network, random_state(shapes))
    key = f'{ours}|{naming}'
    facts[key] = {
      'shapes': shapes,
      'parameters': sum(p.numel() for p in network.parameters()),
      'macs': {size_px: _count_macs(network, size_px) for size_px in sizes},
    }
    for size_px in sizes:
      arrays[f'{key}|{size_px}'] = _torch_logits(
        network, random_images(size_px)
      )
    print(key, facts[key]['parameters'], facts[key]['macs'])
  facts['versions'] = {
    module.__name__: module.__version__ for module in (torch, torchvision, timm)
  }
  arrays['facts'] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
  GOLDEN.mkdir(exist_ok=True)
  np.savez_compressed(GOLDEN / 'torch.npz', **arrays)

  if not DATA.exists():
    print(f'{DATA} is absent: no logits of real weights')
    return
  arrays = {}
  for file, name, padding, mean, std in REAL:
    with np.load(DATA / f'{file}.npz') as weights:
      state = {
        k: v.astype(np.float32)
        for k, v in weights.items()
        if not k.endswith('num_batches_tracked')
      }
    network = getattr(torchvision.models, name)()
    _load(network, state)
    if padding == 'same':
      _pad_as_tensorflow(network)
    for size_px in REAL_SIZES:
      images = real_images(size_px, mean, std)
      arrays[f'{file}|{size_px}'] = _torch_logits(network, images)
  np.savez_compressed(GOLDEN / 'torch_real.npz', **arrays)


if __name__ == '__main__':
  main()
