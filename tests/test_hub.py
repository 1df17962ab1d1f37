# SPDX-License-Identifier: Apache-2.0
"""Weights from a hub: its folders, its cache, and what is said of them."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import torch_golden
from huggingface_hub import constants
from test_torch_weights import SETTINGS

from drnet_jax import mesh as mesh_lib
from drnet_jax import models
from drnet_jax.errors import UserError
from drnet_jax.models import torch_weights
from drnet_jax.run import hub, weights

NAME = 'mobilenetv4_conv_small'
TOLD = {
  'architecture': NAME,
  'num_classes': 10,
  'pretrained_cfg': {
    'input_size': [3, 224, 224],
    'interpolation': 'bicubic',
    'crop_pct': 0.95,
    'mean': [0.5, 0.5, 0.5],
    'std': [0.25, 0.25, 0.25],
  },
}


def create(num_classes=10, **base):
  base = {'network': NAME} | base
  return models.create_drnet(
    **SETTINGS | {'base': base, 'num_classes': num_classes}
  )


@pytest.fixture(scope='module')
def model():
  return create()


@pytest.fixture(scope='module')
def fresh(model):
  shapes = model.shapes
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@pytest.fixture(scope='module')
def state(model, fresh):
  names = torch_weights.export(model, *fresh, 48, naming='timm')
  return torch_golden.random_state(
    {k: x.shape for k, x in names.items() if not k.endswith('tracked')}
  )


@pytest.fixture
def folder(tmp_path, state):
  folder = tmp_path / 'folder'
  folder.mkdir()
  torch_weights.write(str(folder / 'model.safetensors'), state)
  (folder / 'config.json').write_text(json.dumps(TOLD))
  return folder


def load(origin, model, fresh):
  mesh = mesh_lib.create(1)
  return weights.load(
    str(origin), model, fresh, mesh, class_names=(), reset_head=False
  )


def check(loaded, state):
  for norms in loaded[0]['norm'].values():
    np.testing.assert_array_equal(
      norms['stem_norm']['scale'], state['bn1.weight']
    )


def test_a_folder_of_a_hub(folder, model, fresh, state, capsys):
  check(load(folder, model, fresh), state)
  said = capsys.readouterr()
  said = said.out + said.err
  assert 'trained on images of 224 px, bicubic, crop 0.95' in said
  assert 'warning' not in said


@pytest.mark.parametrize(
  'told',
  [
    {'pretrained_cfg': None},
    {'pretrained_cfg': {'mean': None, 'input_size': 224, 'crop_pct': 'all'}},
  ],
)
def test_what_is_null_is_absent(folder, model, fresh, state, told):
  (folder / 'config.json').write_text(json.dumps(TOLD | told))
  check(load(folder, model, fresh), state)


def test_other_pixels_are_named(folder, model, fresh, capsys):
  told = TOLD | {'pretrained_cfg': {'mean': [0.4, 0.5, 0.5], 'std': [0.25] * 3}}
  (folder / 'config.json').write_text(json.dumps(told))
  load(folder, model, fresh)
  said = capsys.readouterr()
  assert '; set --config.model.mean="(0.4, 0.5, 0.5)"\n' in said.out + said.err


@pytest.mark.parametrize(
  'told, message',
  [
    ({'architecture': 'vit_tiny'}, 'vit_tiny, which is none of our networks'),
    (
      {'architecture': 'resnet18'},
      "not that: another network. Set --config.model.base=\"{'network': 'resn",
    ),
    (
      {'architecture': 'mobilenetv4_conv_medium'},
      'weights of mobilenetv4_conv_medium.*stages = ',
    ),
    ({'model_type': 'resnet'}, "names no 'architecture'.*give their file"),
    ([], "names no 'architecture'"),
    ({'architecture': ['resnet18']}, "names no 'architecture'"),
    ({'architecture': 'resnet'}, 'weights of resnet, which is none of our'),
    ('{', 'config.json: Expecting'),
  ],
)
def test_another_network_is_refused(folder, model, fresh, told, message):
  text = told if isinstance(told, str) else json.dumps(told)
  (folder / 'config.json').write_text(text)
  with pytest.raises(UserError, match=message):
    load(folder, model, fresh)


def test_a_workdir_may_be_named_like_a_file(tmp_path, folder):
  workdir = tmp_path / 'run.ckpt'
  workdir.mkdir()
  (workdir / 'config.json').write_text('{}')
  assert not hub.is_weights(str(workdir))
  assert hub.is_weights(str(folder))
  assert hub.is_weights(str(tmp_path / 'absent.ckpt'))


@pytest.mark.parametrize('where', ['folder', 'file'])
def test_norms_with_another_epsilon(tmp_path, where):
  """TensorFlow's EfficientNets compute something else under the same names."""
  path = tmp_path / 'tf_efficientnet_b0_ns-c0e6a31c.npz'
  if where == 'folder':
    path = tmp_path
    told = {'architecture': 'tf_efficientnet_b0'}
    (path / 'config.json').write_text(json.dumps(told))
  torch_weights.write(
    str(path / 'model.safetensors' if where == 'folder' else path),
    {'a': np.zeros(1)},
  )
  with pytest.raises(
    UserError,
    match="padding = 'same' there, 'symmetric' here; epsilon = 0.001 there, "
    "1e-05 here.*'padding': 'same', 'epsilon': 0.001",
  ):
    hub.read(str(path), create(network='efficientnet_b0'))
  right = create(network='efficientnet_b0', padding='same', epsilon=0.001)
  assert hub.read(str(path), right).keys() == {'a'}


def test_a_hub_through_its_cache(folder, model, fresh, state, monkeypatch):
  """Offline, as in HF_HUB_OFFLINE=1; nothing is fetched."""
  cache = folder.parent / 'cache'
  there = cache / 'models--owner--net'
  shutil.copytree(folder, there / 'snapshots' / 'c0ffee')
  (there / 'refs').mkdir()
  (there / 'refs' / 'main').write_text('c0ffee')
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  check(load('hf-hub:owner/net', model, fresh), state)
  os.remove(there / 'snapshots' / 'c0ffee' / 'model.safetensors')
  for origin in ('hf-hub:owner/net', 'hf-hub:owner/other', 'hf-hub:a/b/c'):
    with pytest.raises(UserError, match=f'{origin} cannot be had: '):
      load(origin, model, fresh)


@pytest.mark.parametrize(
  'name, wrap',
  [
    ('a.pth.tar', lambda x: {'epoch': 3, 'state_dict': x}),
    (
      'a.ckpt',
      lambda x: {'state_dict': {f'model.{k}': v for k, v in x.items()}},
    ),
    ('a.pth', lambda x: {f'_orig_mod.module.{k}': v for k, v in x.items()}),
    (
      'a.pt',
      lambda x: {
        'model': {},
        'model_ema': {f'module.{k}': v for k, v in x.items()},
      },
    ),
  ],
)
def test_checkpoints_of_training_scripts(tmp_path, state, name, wrap):
  torch = pytest.importorskip('torch')
  import argparse

  path = str(tmp_path / name)
  tensors = {k: torch.from_numpy(x) for k, x in state.items()}
  torch.save(wrap(tensors), path)
  assert torch_weights.read(path).keys() == state.keys()
  torch.save({'args': argparse.Namespace(lr=1), **wrap(tensors)}, path)
  if 'state_dict' in wrap({}) or 'model' in wrap({}):
    assert torch_weights.read(path).keys() == state.keys()
