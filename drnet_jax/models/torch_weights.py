# SPDX-License-Identifier: Apache-2.0
"""Weights of our networks under the names PyTorch users know, both ways.

torchvision and timm give the same tensors different names; a *naming* maps each
of our modules to one of theirs. Loading is strict: every tensor of the file and
every weight of the network must meet its match, in name and in shape.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from drnet_jax.errors import DAMAGED_ZIP, UserError
from drnet_jax.models import resolution_norm
from drnet_jax.models.drnet import DRNet
from drnet_jax.models.efficientnet import EfficientNet
from drnet_jax.models.layers import HEAD
from drnet_jax.models.mobilenet_v2 import MobileNetV2
from drnet_jax.models.mobilenet_v4 import Conv, Fused, Inverted, MobileNetV4
from drnet_jax.models.resnet import ResNet

Tree = dict[str, Any]
StateDict = dict[str, np.ndarray]

# The last is that of '.pth.tar'.
ENDINGS = ('.safetensors', '.npz', '.pth', '.pt', '.bin', '.ckpt', '.tar')
_UNUSED = 'num_batches_tracked'  # PyTorch's count of steps; not a weight
# Where checkpoints keep weights beside other things, the averaged ones first.
_NESTED = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
# What DataParallel, averaging, torch.compile and Lightning put before names.
_PREFIXES = ('module.', '_orig_mod.', 'model.')

_LEAF_NAMES = {
  ('params', 'kernel'): 'weight',
  ('params', 'scale'): 'weight',
  ('params', 'bias'): 'bias',
  ('batch_stats', 'mean'): 'running_mean',
  ('batch_stats', 'var'): 'running_var',
}


def read(path: str) -> StateDict:
  """Reads a state dict, as float32 arrays by PyTorch's names.

  Args:
    path: a .safetensors, .npz, .pth, .pth.tar, .pt, .bin or .ckpt file; the
      last five need PyTorch and are read with `weights_only`, which runs no
      code from them. A checkpoint that holds the weights beside other things
      will do, and so will names that all have the same prefix.

  Raises:
    UserError: the file is missing, damaged, or holds more than tensors.
  """
  ending = os.path.splitext(path)[1].lower()
  if not os.path.exists(path):
    raise UserError(f'{path}: there is no such file')
  if ending not in ENDINGS:
    raise UserError(f'{path}: weights are read from {", ".join(ENDINGS)}')
  try:
    if ending == '.safetensors':
      found = safetensors.numpy.load_file(path)
    elif ending == '.npz':
      file = np.load(path, allow_pickle=False)
      if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError('it holds one array without a name')
      with file:
        found = dict(file)
    else:
      found = _read_pickle(path)
  except (OSError, *DAMAGED_ZIP, safetensors.SafetensorError) as error:
    raise UserError(f'{path} is damaged or no {ending}: {error}') from error
  found.pop('n_averaged', None)  # another count of PyTorch's
  state = {}
  for name, x in _without_prefix(found).items():
    if x.dtype.kind not in 'fiu' and x.dtype.name != 'bfloat16':
      raise UserError(f'{path}: {name} holds {x.dtype}, no numbers')
    if name.rpartition('.')[2] != _UNUSED:
      state[name] = np.asarray(x, np.float32)
      if not np.isfinite(state[name]).all():
        raise UserError(f'{path}: {name} holds NaN or infinity')
  return state


def write(path: str, state: Mapping[str, np.ndarray]) -> None:
  """Writes a state dict in the format that the ending of `path` names.

  Raises:
    UserError: unknown ending, no PyTorch for .pth, or nowhere to write.
  """
  ending = os.path.splitext(path)[1].lower()
  state = {name: np.ascontiguousarray(x) for name, x in state.items()}
  try:
    if ending == '.safetensors':
      safetensors.numpy.save_file(state, path)
    elif ending == '.npz':
      with open(path, 'wb') as file:
        np.savez(file, **state)
    elif ending in ENDINGS:
      torch = _torch(path)
      torch.save({k: torch.from_numpy(x) for k, x in state.items()}, path)
    else:
      raise UserError(f'{path}: weights are written to {", ".join(ENDINGS)}')
  # PyTorch's are RuntimeErrors.
  except (OSError, RuntimeError, safetensors.SafetensorError) as error:
    raise UserError(f'cannot write {path}: {error}') from error


def to_variables(
  network: nn.Module,
  like: Mapping[str, Any],
  state: Mapping[str, np.ndarray],
  *,
  reset_head: bool,
) -> Tree:
  """A network's variables from a state dict.

  Args:
    network: of a kind in `_NAMINGS`.
    like: its variables, {'params': ..., 'batch_stats': ...}; arrays or shapes.
    state: from `read`, in any naming that there is for the network.
    reset_head: keep the classifier of `like` and ignore the file's.

  Returns:
    {'params': ..., 'batch_stats': ...}, float32.

  Raises:
    UserError: the network has no naming, or tensors are missing, unused or of
      another shape; all are named.
  """
  like = {k: like[k] for k in ('params', 'batch_stats')}
  flat = traverse_util.flatten_dict(like)
  tables = [
    {path: _torch_name(names, path) for path in flat}
    for names in _namings(network).values()
  ]
  table = max(tables, key=lambda t: len(state.keys() & set(t.values())))
  heads = {path for path in flat if path[1] == HEAD} if reset_head else set()
  missing = sorted({n for p, n in table.items() if p not in heads} - set(state))
  unused = sorted(set(state) - set(table.values()))
  if missing or unused:
    raise UserError(
      f'the weights are not those of this {type(network).__name__}: '
      f'{len(missing)} missing, {len(unused)} unused. '
      f'{", ".join(missing) or "none"} missing; '
      f'{", ".join(unused) or "none"} unused.'
    )
  variables, wrong = dict(flat), {}
  for path in flat.keys() - heads:
    name, shape = table[path], flat[path].shape
    value = _from_torch(state[name], len(shape))
    variables[path] = value
    if value.shape != shape:
      wrong[path] = f'{name}: {value.shape} there, {shape} here'
  listed = '; '.join(sorted(wrong.values()))
  if any(path[1] != HEAD for path in wrong):
    raise UserError(
      f'the weights are of a {type(network).__name__} of another shape '
      f'(as we lay them out): {listed}'
    )
  if wrong:
    raise UserError(
      f'the classifier is for another number of classes: {listed}. For a new '
      'classifier: --config.reset_head=True'
    )
  return traverse_util.unflatten_dict(variables)


def to_state_dict(
  network: nn.Module, variables: Mapping[str, Any], *, naming: str
) -> StateDict:
  """A network's variables as a state dict that PyTorch loads strictly.

  Args:
    network: of a kind in `_NAMINGS`.
    variables: {'params': ..., 'batch_stats': ...}.
    naming: 'torchvision' or 'timm'.

  Raises:
    UserError: the network has no such naming.
  """
  namings = _namings(network)
  if naming not in namings:
    raise UserError(f'naming {naming!r} is not one of {sorted(namings)}')
  otherwise = [
    f'{field} = {value!r}'
    for field, value, usual in (
      ('padding', getattr(network, 'padding', 'symmetric'), 'symmetric'),
      ('epsilon', getattr(network, 'epsilon', 1e-5), 1e-5),
    )
    if value != usual
  ]
  if otherwise and naming == 'torchvision':
    raise UserError(
      f"torchvision's {type(network).__name__} would load these weights and "
      f'compute something else: it has not {" and ".join(otherwise)}. '
      '--naming=timm is for the tf_ networks of timm, which have'
    )
  state = {}
  for path, x in traverse_util.flatten_dict(dict(variables)).items():
    name = _torch_name(namings[naming], path)
    state[name] = _to_torch(np.asarray(x, np.float32), path)
    if path[-1] == 'mean':
      counter = name.removesuffix('running_mean') + _UNUSED
      state[counter] = np.zeros((), np.int64)
  return state


def load(
  model: DRNet,
  params: Tree,
  batch_stats: Tree,
  state: Mapping[str, np.ndarray],
  *,
  reset_head: bool,
) -> tuple[Tree, Tree]:
  """A dynamic model from a fixed one: every size gets its norms.

  Args:
    model: whose base network the state dict is of.
    params, batch_stats: of the model; the predictor's are kept, and the head's
      with `reset_head`.
    state, reset_head: see `to_variables`, as for the errors.

  Returns:
    (params, batch_stats).
  """
  like = model.variables(params, batch_stats, model.resolutions[0])
  variables = to_variables(model.base, like, state, reset_head=reset_head)
  stats = variables['batch_stats']
  shared, norm = resolution_norm.split(variables['params'], stats)
  sets = params['norm']
  return (
    params | {'base': shared, 'norm': dict.fromkeys(sets, norm)},
    batch_stats | {'norm': dict.fromkeys(sets, stats)},
  )


def export(
  model: DRNet, params: Tree, batch_stats: Tree, size_px: int, *, naming: str
) -> StateDict:
  """A model's base network with the norms of one size; see `to_state_dict`.

  Raises:
    UserError: not one of the sizes, or the network has no such naming.
  """
  if size_px not in model.resolutions:
    raise UserError(f'{size_px} px is not one of {model.resolutions}')
  variables = model.variables(params, batch_stats, size_px)
  return to_state_dict(model.base, jax.device_get(variables), naming=naming)


def _read_pickle(path: str) -> Mapping[str, np.ndarray]:
  torch = _torch(path)
  try:
    # Training scripts keep their flags beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
      found = torch.load(path, map_location='cpu', weights_only=True)
  # PyTorch reports damage, and pickles with code in them, in many ways.
  except Exception as error:
    reason = str(error).partition('\n')[0]
    raise UserError(
      f'{path} is damaged, or holds code beside its tensors, which is not run: '
      f'{reason}. Save the state_dict() alone, or as .safetensors.'
    ) from error
  if isinstance(found, Mapping):
    for key in _NESTED:
      if isinstance(found.get(key), Mapping):
        found = found[key]
        break
  if not isinstance(found, Mapping) or not all(
    isinstance(name, str) and isinstance(x, torch.Tensor)
    for name, x in found.items()
  ):
    raise UserError(
      f'{path} holds no state dict; save model.state_dict() alone'
    )
  return {name: x.detach().float().numpy() for name, x in found.items()}


def _without_prefix(state: StateDict) -> StateDict:
  for prefix in _PREFIXES:
    if state and all(name.startswith(prefix) for name in state):
      bare = {name.removeprefix(prefix): x for name, x in state.items()}
      return _without_prefix(bare)
  return state


def _torch(path: str):
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f"{path}: this format needs PyTorch (pip install 'drnet_jax[torch]'); "
      '.safetensors and .npz do not'
    ) from error
  return torch


def _torch_name(names: Mapping[str, str], path: tuple[str, ...]) -> str:
  collection, *module, leaf = path
  return f'{names["/".join(module)]}.{_LEAF_NAMES[collection, leaf]}'


def _from_torch(x: np.ndarray, rank: int) -> np.ndarray:
  """Kernels from output-first to output-last; the rest as it is."""
  if x.ndim == 4 and rank == 2 and x.shape[2:] == (1, 1):
    x = x[:, :, 0, 0]  # a 1x1 convolution of one pixel is a dense layer
  if x.ndim == 4:
    return x.transpose(2, 3, 1, 0)
  return x.T if x.ndim == 2 else x


def _to_torch(x: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
  if path[-1] != 'kernel':
    return x
  if x.ndim == 4:
    return x.transpose(3, 2, 0, 1)
  is_gate = path[-2] in ('squeeze', 'excite')
  return x.T[:, :, None, None] if is_gate else x.T


# Our modules' names and theirs: (ours, theirs), or for a convolution and its
# norm (ours, its, its norm's). A naming may hold more than a network has.
_Names = Iterator[tuple[str, ...]]


def _resnet(network: ResNet) -> _Names:
  is_deep = network.stem == 'deep'
  yield 'stem1', 'conv1.0', 'conv1.1'
  yield 'stem2', 'conv1.3', 'conv1.4'
  yield 'stem', 'conv1.6' if is_deep else 'conv1', 'bn1'
  conv, norm = (1, 2) if is_deep else (0, 1)  # after the pool
  for i, blocks in enumerate(network.stage_sizes, 1):
    for j in range(blocks):
      ours, theirs = f'stage{i}_block{j + 1}', f'layer{i}.{j}'
      for n in (1, 2, 3):
        yield f'{ours}/conv{n}', f'{theirs}.conv{n}'
        yield f'{ours}/norm{n}', f'{theirs}.bn{n}'
      shrunk = f'{theirs}.downsample'
      yield f'{ours}/shortcut', f'{shrunk}.{conv}', f'{shrunk}.{norm}'
  yield HEAD, 'fc'


def _mobilenet_torchvision(network: MobileNetV2) -> _Names:
  yield _in_sequence('stem', 'features.0')
  index = 0
  for i, (expansion, _, blocks, _) in enumerate(network.stages, 1):
    for j in range(blocks):
      index += 1
      ours, theirs = f'stage{i}_block{j + 1}', f'features.{index}.conv'
      n = int(expansion != 1)
      yield _in_sequence(f'{ours}/expand', f'{theirs}.0')
      yield _in_sequence(f'{ours}/depthwise', f'{theirs}.{n}')
      yield f'{ours}/project', f'{theirs}.{n + 1}', f'{theirs}.{n + 2}'
  yield _in_sequence('head', f'features.{index + 1}')
  yield HEAD, 'classifier.1'


def _efficientnet_torchvision(network: EfficientNet) -> _Names:
  yield _in_sequence('stem', 'features.0')
  for i, (expansion, _, blocks, _, _) in enumerate(network.stages, 1):
    for j in range(blocks):
      ours, theirs = f'stage{i}_block{j + 1}', f'features.{i}.{j}.block'
      n = int(expansion != 1)
      yield _in_sequence(f'{ours}/expand', f'{theirs}.0')
      yield _in_sequence(f'{ours}/depthwise', f'{theirs}.{n}')
      yield f'{ours}/squeeze', f'{theirs}.{n + 1}.fc1'
      yield f'{ours}/excite', f'{theirs}.{n + 1}.fc2'
      yield _in_sequence(f'{ours}/project', f'{theirs}.{n + 2}')
  yield _in_sequence('head', f'features.{len(network.stages) + 1}')
  yield HEAD, 'classifier.1'


def _mobile_timm(network: MobileNetV2 | EfficientNet) -> _Names:
  yield 'stem', 'conv_stem', 'bn1'
  for i, (expansion, _, blocks, *_) in enumerate(network.stages, 1):
    n = int(expansion != 1)
    project = 'conv_pwl' if n else 'conv_pw'
    for j in range(blocks):
      ours, theirs = f'stage{i}_block{j + 1}', f'blocks.{i - 1}.{j}'
      yield f'{ours}/expand', f'{theirs}.conv_pw', f'{theirs}.bn1'
      yield f'{ours}/depthwise', f'{theirs}.conv_dw', f'{theirs}.bn{n + 1}'
      yield f'{ours}/project', f'{theirs}.{project}', f'{theirs}.bn{n + 2}'
      yield f'{ours}/squeeze', f'{theirs}.se.conv_reduce'
      yield f'{ours}/excite', f'{theirs}.se.conv_expand'
  yield 'head', 'conv_head', 'bn2'
  yield HEAD, 'classifier'


def _mobilenet_v4_timm(network: MobileNetV4) -> _Names:
  parts = {
    Conv: (('', 'conv', 'bn1'),),
    Fused: (('_expand', 'conv_exp', 'bn1'), ('_project', 'conv_pwl', 'bn2')),
    Inverted: (
      ('_start', 'dw_start.conv', 'dw_start.bn'),
      ('_expand', 'pw_exp.conv', 'pw_exp.bn'),
      ('_middle', 'dw_mid.conv', 'dw_mid.bn'),
      ('_project', 'pw_proj.conv', 'pw_proj.bn'),
    ),
  }
  yield 'stem', 'conv_stem', 'bn1'
  for i, blocks in enumerate(network.stages):
    for j, block in enumerate(blocks):
      ours, theirs = f'stage{i + 1}_block{j + 1}', f'blocks.{i}.{j}'
      for part, conv, norm in parts[type(block)]:
        yield f'{ours}{part}', f'{theirs}.{conv}', f'{theirs}.{norm}'
  yield 'head', 'conv_head', 'norm_head'
  yield HEAD, 'classifier'


def _in_sequence(ours: str, theirs: str) -> tuple[str, str, str]:
  """torchvision's nn.Sequential of a convolution and its norm."""
  return ours, f'{theirs}.0', f'{theirs}.1'


_NAMINGS: dict[type[nn.Module], dict[str, Callable[..., _Names]]] = {
  ResNet: {'torchvision': _resnet, 'timm': _resnet},
  MobileNetV2: {'torchvision': _mobilenet_torchvision, 'timm': _mobile_timm},
  EfficientNet: {
    'torchvision': _efficientnet_torchvision,
    'timm': _mobile_timm,
  },
  MobileNetV4: {'timm': _mobilenet_v4_timm},
}


def _namings(network: nn.Module) -> dict[str, dict[str, str]]:
  """For each naming that a network has, our modules' names to theirs."""
  kind = type(network)
  stem = getattr(network, 'stem', None)
  if kind not in _NAMINGS or stem == 'patch':
    known = ', '.join(kind.__name__ for kind in _NAMINGS)
    raise UserError(
      f'PyTorch has no names for the weights of this {kind.__name__}; there '
      f"are namings for {known}, but not with the stem 'patch'"
    )
  namings = dict(_NAMINGS[kind])
  if getattr(network, 'lite', False) or stem == 'deep':
    del namings['torchvision']  # which has no such network
  return {name: dict(_single(make(network))) for name, make in namings.items()}


def _single(names: _Names) -> Iterator[tuple[str, str]]:
  """Names of a convolution and its norm apart."""
  for ours, *theirs in names:
    if len(theirs) == 2:
      yield from zip((f'{ours}_conv', f'{ours}_norm'), theirs, strict=True)
    else:
      yield ours, theirs[0]
