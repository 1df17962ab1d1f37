# SPDX-License-Identifier: Apache-2.0
"""Weights where people keep them: a file, a hub's folder, a hub itself.

A hub's folder is as timm and the Hugging Face Hub lay it out: model.safetensors
or pytorch_model.bin, and a config.json that says which network this is and how
its images were prepared. Where ours differs, a network that computes something
else is refused, and images that look different are warned of.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from drnet_jax import models, terminal
from drnet_jax.errors import UserError
from drnet_jax.models import torch_weights
from drnet_jax.models.drnet import DRNet

_HUB = 'hf-hub:'
_FILES = ('model.safetensors', 'pytorch_model.bin')
# Fields of networks that do not change what they compute in evaluation.
_IRRELEVANT = 'parent name num_classes dtype dropout drop zero_init'.split()


def is_weights(origin: str) -> bool:
  """Whether this names weights under PyTorch's names, not a workdir."""
  if origin.startswith(_HUB):
    return True
  if os.path.isdir(origin):
    return any(os.path.exists(os.path.join(origin, file)) for file in _FILES)
  return os.path.splitext(origin)[1].lower() in torch_weights.ENDINGS


def read(origin: str, model: DRNet) -> torch_weights.StateDict:
  """Reads weights for a model's base network, and says what they are.

  Args:
    origin: 'hf-hub:<owner>/<name>', with '@<revision>' if need be, looked up
      in the hub's cache first; a folder from there; or a file, see
      `torch_weights.read`.
    model: that they are for.

  Raises:
    UserError: they cannot be had or read, or belong to another network.
  """
  path = _download(origin) if origin.startswith(_HUB) else origin
  told = {}
  if os.path.isdir(path):
    told = _read_config(os.path.join(path, 'config.json'))
    files = (os.path.join(path, name) for name in _FILES)
    path = next(filter(os.path.exists, files))
  elif os.path.basename(path).startswith('tf_'):
    # timm's files of TensorFlow's weights, whose names have a suffix.
    name = re.match(r'tf_efficientnet_(b\d|lite\d)', os.path.basename(path))
    told = {'architecture': name[0]} if name else {}
  if 'architecture' in told:
    _check_network(origin, told['architecture'], model.base)
  images = told.get('pretrained_cfg')
  _compare_images(origin, images if isinstance(images, dict) else told, model)
  return torch_weights.read(path)


def _download(origin: str) -> str:
  """The folder of the hub's cache that then holds a repository's weights."""
  try:
    from huggingface_hub import errors, hf_hub_download
  except ImportError as error:
    raise UserError(
      f"{origin} needs huggingface_hub: pip install 'drnet_jax[hub]'"
    ) from error
  repository, _, revision = origin.removeprefix(_HUB).partition('@')

  def get(file: str) -> str:
    return hf_hub_download(repository, file, revision=revision or None)

  try:
    folder = os.path.dirname(get('config.json'))
    try:
      get(_FILES[0])
    except errors.EntryNotFoundError:
      get(_FILES[1])
    return folder
  except (errors.HfHubHTTPError, OSError, ValueError) as error:
    reason = str(error).strip().partition('\n')[0]
    raise UserError(
      f'{origin} cannot be had: {reason} To do without the hub, give a folder '
      f'with config.json and {_FILES[0]}.'
    ) from error


def _read_config(path: str) -> dict[str, Any]:
  try:
    with open(path) as file:
      told = json.load(file)
    network = told.get('architecture') if isinstance(told, dict) else None
    if not isinstance(network, str):
      raise ValueError("it names no 'architecture', as timm's do")
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path}: {error}. If you know the weights to be those of '
      'config.model.base, give their file in place of the folder.'
    ) from error
  return told


def _check_network(origin: str, architecture: str, ours) -> None:
  """Raises UserError if the weights are for a network unlike ours."""
  name, fields = architecture, {}
  if name.startswith('tf_'):
    name = name.removeprefix('tf_')
    fields = {'padding': 'same', 'epsilon': 1e-3}
  if width := re.fullmatch(r'mobilenetv2_(\d{3})', name):
    name, fields = 'mobilenet_v2', {'width': int(width[1]) / 100}
  try:
    theirs = models.NETWORKS[name](num_classes=1, **fields)
  except (KeyError, TypeError) as error:  # 'resnet' alone says too little
    raise UserError(
      f'{origin} holds weights of {architecture}, which is none of our '
      f'networks: {", ".join(sorted(models.NETWORKS))}. If you know them to be '
      'those of config.model.base, give their file in place of the folder.'
    ) from error
  unlike = ['another network']
  if type(theirs) is type(ours):
    there, here = vars(theirs), vars(ours)
    unlike = [
      f'{x.name} = {there[x.name]!r} there, {here[x.name]!r} here'
      for x in dataclasses.fields(theirs)
      if x.name not in _IRRELEVANT and there[x.name] != here[x.name]
    ]
  if unlike:
    raise UserError(
      f'{origin} holds weights of {architecture}, and config.model.base is '
      f'not that: {"; ".join(unlike)}. Set --config.model.base='
      f'"{ {"network": name} | fields }"'
    )


def _compare_images(origin: str, told: Mapping, model: DRNet) -> None:
  """Says how the images of these weights looked, and what differs here."""
  # What is null, or of another kind, is as good as absent.
  size, crop = told.get('input_size'), told.get('crop_pct')
  ways = [
    f'{size[-1]} px' if isinstance(size, list) and size else '',
    str(told.get('interpolation') or ''),
    f'crop {crop:g}' if isinstance(crop, int | float) else '',
  ]
  if known := ', '.join(filter(None, ways)):
    terminal.say(f'{origin}: trained on images of {known}')
  flags = [
    f'--config.model.{field}="{tuple(there)}"'
    for field in ('mean', 'std')
    if isinstance(there := told.get(field), list)
    and tuple(there) != tuple(getattr(model, field))
  ]
  if flags:
    terminal.say(
      f'warning: {origin} was trained on pixels normalised differently; set '
      f'{" ".join(flags)}'
    )
