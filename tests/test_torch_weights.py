# SPDX-License-Identifier: Apache-2.0
"""Files of PyTorch weights: what is read, and what is refused."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch_golden
from conftest import random_batch

from configs import smoke
from drnet_jax import mesh as mesh_lib
from drnet_jax import models
from drnet_jax.errors import UserError
from drnet_jax.models import torch_weights
from drnet_jax.run import weights, workdir

SETTINGS = {
  'predictor': None,
  'predictor_px': 1,
  'image_px': 48,
  'resolutions': (33, 48),
  'resolution_aware_bn': True,
  'antialias': True,
  'mean': (0.5, 0.5, 0.5),
  'std': (0.25, 0.25, 0.25),
}
BASE = {
  'network': 'mobilenet_v2',
  'stages': ((1, 16, 1, 1), (6, 24, 2, 2)),
  'head': 32,
}


def create(num_classes=10, **changes):
  return models.create_drnet(
    **SETTINGS | {'base': BASE, 'num_classes': num_classes} | changes
  )


@pytest.fixture(scope='module')
def model():
  return create()


@pytest.fixture(scope='module')
def fresh(model):
  return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope='module')
def state(model, fresh):
  """A state dict under torchvision's names, drawn at random."""
  names = torch_weights.export(model, *fresh, 48, naming='torchvision')
  return torch_golden.random_state(
    {k: x.shape for k, x in names.items() if not k.endswith('tracked')}
  )


def load(model, fresh, state, reset_head=False):
  return torch_weights.load(model, *fresh, state, reset_head=reset_head)


def test_every_size_gets_the_norms(model, fresh, state):
  params, stats = load(model, fresh, state)
  assert set(params['norm']) == set(stats['norm']) == {'r33', 'r48'}
  for tree in (params['norm'], stats['norm']):
    jax.tree.map(np.testing.assert_array_equal, tree['r33'], tree['r48'])
  for size_px in model.resolutions:
    back = torch_weights.export(
      model, params, stats, size_px, naming='torchvision'
    )
    for name, x in state.items():
      np.testing.assert_array_equal(back[name], x)
  with pytest.raises(UserError, match=r'40 px is not one of \(33, 48\)'):
    torch_weights.export(model, params, stats, 40, naming='timm')


def test_the_classes_may_differ_only_when_asked(fresh, state):
  model = create(num_classes=7)
  fresh = jax.jit(model.init)(jax.random.key(0))
  with pytest.raises(UserError, match='another number of classes.*classifier'):
    load(model, fresh, state)
  params, _ = load(model, fresh, state, reset_head=True)
  jax.tree.map(
    np.testing.assert_array_equal,
    params['base']['head'],
    fresh[0]['base']['head'],
  )
  np.testing.assert_array_equal(
    params['base']['stem_conv']['kernel'],
    state['features.0.0.weight'].transpose(2, 3, 1, 0),
  )


def test_missing_and_unused_tensors_are_all_named(model, fresh, state):
  wrong = dict(state)
  wrong['extra.weight'] = wrong.pop('features.3.conv.3.bias')
  with pytest.raises(
    UserError,
    match='features.3.conv.3.bias missing; extra.weight unused',
  ):
    load(model, fresh, wrong)


@pytest.mark.parametrize('same', [True, False])
def test_a_predictor_like_the_base_begins_with_its_weights(
  state, tmp_path, same
):
  like = BASE if same else BASE | {'head': 48}
  model = create(predictor=like, predictor_px=40)
  fresh = jax.jit(model.init)(jax.random.key(0))
  file = str(tmp_path / 'weights.npz')
  torch_weights.write(file, state)
  params, stats = weights.load(
    file,
    model,
    fresh,
    mesh_lib.create(1),
    class_names=(),
    reset_head=False,
  )
  began, began_stats = fresh[0]['predictor'], fresh[1]['predictor']
  if same:
    base = model.variables(params, stats, 33)
    began = base['params'] | {'head': began['head']}
    began_stats = base['batch_stats']
    assert began['head']['kernel'].shape[1] == len(model.resolutions)
  jax.tree.map(np.testing.assert_array_equal, params['predictor'], began)
  jax.tree.map(np.testing.assert_array_equal, stats['predictor'], began_stats)


@pytest.mark.parametrize('other', [{'padding': 'same'}, {'epsilon': 1e-3}])
def test_torchvision_has_no_network_that_computes_otherwise(other):
  """It would load the weights, strictly, and compute something else."""
  base = {'network': 'efficientnet_b0'}
  made = models.create_drnet(base=base | other, num_classes=5, **SETTINGS)
  params, stats = made.shapes
  fresh = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (params, stats))
  with pytest.raises(UserError, match='compute something else: .*timm'):
    torch_weights.export(made, *fresh, 48, naming='torchvision')
  assert torch_weights.export(made, *fresh, 48, naming='timm')


def test_another_width_is_refused(fresh, state):
  wide = create(base=BASE | {'width': 0.5})
  with pytest.raises(UserError, match='of another shape'):
    load(wide, jax.jit(wide.init)(jax.random.key(0)), state)


def test_a_network_without_names_is_refused(fresh, state):
  base = {
    'network': 'resnet',
    'stage_sizes': (1,),
    'width': 4,
    'stem': 'patch',
  }
  model = create(base=base)
  with pytest.raises(UserError, match='PyTorch has no names'):
    load(model, jax.jit(model.init)(jax.random.key(0)), state)


@pytest.mark.parametrize('ending', ['.safetensors', '.npz', '.pth'])
def test_written_is_read(tmp_path, state, ending):
  if ending == '.pth':
    pytest.importorskip('torch')
  path = str(tmp_path / f'weights{ending}')
  torch_weights.write(path, state)
  found = torch_weights.read(path)
  assert found.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(found[name], x)


def test_half_precision_wrapped_and_counted(tmp_path, state):
  """float16, the names of DataParallel, and PyTorch's counters."""
  path = str(tmp_path / 'weights.npz')
  half = {f'module.{k}': x.astype(np.float16) for k, x in state.items()}
  np.savez(path, **half, **{'module.bn.num_batches_tracked': np.int64(3)})
  found = torch_weights.read(path)
  assert found.keys() == state.keys()
  assert {x.dtype for x in found.values()} == {np.dtype('float32')}


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('absent.npz', None, 'there is no such file'),
    ('weights.onnx', b'', 'weights are read from'),
    ('text.npz', b'hello', 'is damaged or no .npz'),
    ('text.safetensors', b'hello, this is text', 'is damaged or no .safeten'),
    ('empty.safetensors', b'', 'is damaged or no .safetensors'),
    ('words.npz', {'a': np.array(['b'])}, 'a holds <U1, no numbers'),
    ('nameless.npz', np.zeros(3), 'holds one array without a name'),
  ],
)
def test_files_that_are_no_weights(tmp_path, name, content, message):
  path = tmp_path / name
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif isinstance(content, dict):
    np.savez(path, **content)
  elif content is not None:
    with open(path, 'wb') as file:
      np.save(file, content)
  with pytest.raises(UserError, match=message):
    torch_weights.read(str(path))


@pytest.mark.parametrize('ending', ['.safetensors', '.npz', '.pth'])
def test_truncated_files(tmp_path, state, ending):
  if ending == '.pth':
    pytest.importorskip('torch')
  path = tmp_path / f'weights{ending}'
  torch_weights.write(str(path), state)
  path.write_bytes(path.read_bytes()[:-5000])
  with pytest.raises(UserError, match='is damaged'):
    torch_weights.read(str(path))


def test_arrays_of_objects_are_not_unpickled(tmp_path):
  path = str(tmp_path / 'weights.npz')
  np.savez(path, x=np.array([{}], dtype=object))
  with pytest.raises(UserError, match='is damaged or no .npz'):
    torch_weights.read(path)


def test_nan_is_refused(tmp_path):
  path = str(tmp_path / 'weights.safetensors')
  x = np.array([1.0, np.nan], np.float32)
  safetensors.numpy.save_file({'conv.weight': x}, path)
  with pytest.raises(UserError, match='conv.weight holds NaN'):
    torch_weights.read(path)


class Payload:
  """A pickle that would write a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (self.path, 'w'))


def test_code_in_a_pickle_is_not_run(tmp_path):
  torch = pytest.importorskip('torch')
  path, trace = str(tmp_path / 'evil.pth'), tmp_path / 'trace'
  torch.save({'weight': Payload(str(trace))}, path)
  with pytest.raises(UserError, match='code beside its tensors'):
    torch_weights.read(path)
  assert not trace.exists()


def test_checkpoints_with_more_than_weights(tmp_path, state):
  torch = pytest.importorskip('torch')
  path = str(tmp_path / 'checkpoint.pth')
  tensors = {k: torch.from_numpy(x) for k, x in state.items()}
  torch.save({'epoch': 3, 'state_dict': tensors}, path)
  assert torch_weights.read(path).keys() == state.keys()
  torch.save({'epoch': 3}, path)
  with pytest.raises(UserError, match='holds no state dict'):
    torch_weights.read(path)


@pytest.mark.slow
def test_imported_runs_can_be_used_and_exported(tmp_path, data_dir):
  """convert in, load, train from, convert out: the weights stay the same."""
  config = smoke.get_config()
  config.data.data_dir = data_dir
  with config.unlocked():
    config.model.base = BASE
  model = models.create(config.model, num_classes=10)
  fresh = jax.jit(model.init)(jax.random.key(1))
  names = torch_weights.export(model, *fresh, 64, naming='timm')
  state = torch_golden.random_state(
    {k: x.shape for k, x in names.items() if not k.endswith('tracked')}
  )
  file, path = str(tmp_path / 'in.npz'), str(tmp_path / 'run')
  torch_weights.write(file, state)
  weights.import_torch(config, file, path)

  mesh = mesh_lib.create(1)
  trained = workdir.load(path, mesh)
  assert not trained.has_router and trained.origin == 'stage initial, step 0'
  images = random_batch(3, image_px=64)['image']
  params, stats = load(model, fresh, torch_weights.read(file))
  np.testing.assert_array_equal(
    trained.model.logits_at(trained.params, trained.batch_stats, images, 32),
    model.logits_at(params, stats, images, 32),
  )
  load_run = functools.partial(
    weights.load, path, model, fresh, mesh, class_names=trained.class_names
  )
  again, _ = load_run(reset_head=False)
  np.testing.assert_array_equal(
    again['base']['head']['kernel'], params['base']['head']['kernel']
  )
  reset, _ = load_run(reset_head=True)
  np.testing.assert_array_equal(
    reset['base']['head']['kernel'], fresh[0]['base']['head']['kernel']
  )
  out = str(tmp_path / 'out.safetensors')
  weights.export_torch(path, out, 16, 'timm')
  found = torch_weights.read(out)
  for name, x in torch_weights.read(file).items():
    np.testing.assert_array_equal(found[name], x)


def test_weights_of_another_model_are_named(fresh):
  other = create(base=BASE | {'width': 0.5})
  theirs = jax.jit(other.init)(jax.random.key(0))
  with pytest.raises(UserError, match='holds another model: base/head_conv'):
    weights._check_same_shapes('run', theirs, fresh)
