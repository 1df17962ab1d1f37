# SPDX-License-Identifier: Apache-2.0
"""Every config is what its header says: commands work, models add up."""

import ast
import functools
import pathlib
import shlex
import sys
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from configs import cifar10_ranet_tiny, quickstart
from drnet_jax import models, settings
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError
from drnet_jax.run import describe, train, weights, workdir
from drnet_jax.run.stage import STEPS

pytestmark = [
  # ml_collections loads config files in a way that Python is to drop.
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
  pytest.mark.usefixtures('shapes_alone'),
]

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
FILES = sorted(CONFIGS.glob('*.py'))


def commands(path):
  """The commands of a config's header, each as a list of arguments."""
  header = ast.get_docstring(ast.parse(path.read_text()))
  found = []
  for line in header.splitlines():
    if line.startswith('python -m'):
      found.append(line)
    elif line.startswith('--'):
      found[-1] += f' {line}'
  return [shlex.split(command) for command in found]


def parse(arguments):
  """The config of a command line, or None where it has none."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, flag_values=values)
  for name in ('workdir', 'from_torch', 'mode', 'compare'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  # It looks for overrides in the process's arguments.
  with mock.patch.object(sys, 'argv', arguments[2:]):
    values(sys.argv)
    return values['config'].value


ALL = [
  pytest.param(command, id=f'{path.stem}-{i}')
  for path in FILES
  for i, command in enumerate(commands(path))
]


_MODELS = {}  # that several commands make


def create_model(config):
  data = settings.call(Data, config.data, 'config.data')
  # Data sets that are not on this machine: their number of classes is enough.
  if data.name in ('folder', 'packed') and not data.classes:
    names = tuple(map(str, range(1000)))
  else:
    names = data.class_names()
  key = (repr(config.model.to_dict()), len(names))
  if key not in _MODELS:
    _MODELS[key] = models.create(config.model, num_classes=len(names))
  return _MODELS[key]


@functools.cache
def macs_of(model):
  return model.macs()


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_header_has_a_command_for_its_file(path):
  assert any(f'--config=configs/{path.name}' in c for c in commands(path))


@pytest.mark.parametrize('command', ALL)
def test_commands_of_the_headers(command):
  config = parse(command)
  if config is None:
    assert '--mode=evaluate' in command or 'calibrate' in command
    return
  run = train.read(config)
  model = create_model(config)
  for stage in run.stages.values():
    step = STEPS[stage.step]
    assert isinstance(model, step.model_class)
    if 'predictor' in step.trains:
      macs = macs_of(model)
      target = stage.objective['target_gmacs']
      assert macs.gmacs[0] < target <= 1.02 * macs.gmacs[-1]


# The paper's Tables 1 to 6: parameters in M, GMACs of the largest size, of the
# predictor. It seems to count one set of norms: 25.6 + 4.9 = 30.5. Its 49.4 is
# the sum of the rounded parts; the rounded sum is 49.5.
PAPER = {
  'in1k': (30_464_363, 30.5, 4.089, 0.290),
  'in1k_resnet101': (49_456_491, 49.5, 7.801, 0.290),
  'in1k_mobilenet_v2': (3_753_723, 3.8, 0.301, 0.005),
  'in1k_fixed': (25_557_032, 25.6, 4.089, 0),
  'in1k_fixed_mobilenet_v2': (3_504_872, 3.5, 0.301, 0),
  'in1k_random': (25_557_032, 25.6, 4.089, 0),
}


@pytest.mark.parametrize('name', PAPER)
def test_totals_of_the_paper(name):
  exact, millions, gmacs, predictor = PAPER[name]
  config = parse(['', '', '', f'--config={CONFIGS / name}.py'])
  model = create_model(config)
  counts = describe.count_parameters(model)
  assert counts['with one set of norms'] == exact
  assert round(exact / 1e6, 1) == millions
  sets = len(model.resolutions)
  private = next(v for k, v in counts.items() if k.startswith('norms'))
  assert counts['in all'] - exact == private * (sets - 1) // sets
  macs = macs_of(model)
  assert round(macs.gmacs[-1], 3) == gmacs
  assert round(macs.predictor / 1e9, 3) == predictor


def test_width_and_size_of_the_baselines():
  path = CONFIGS / 'in1k_fixed_mobilenet_v2.py'
  gmacs, parameters = [], []
  for command in commands(path):
    model = create_model(parse(command))
    gmacs.append(round(macs_of(model).gmacs[0], 3))
    parameters.append(describe.count_parameters(model)['in all'])
  assert gmacs == [0.301, 0.221, 0.209]  # Table 6: 300, 221, 209 M
  assert parameters == [3_504_872, 3_504_872, 2_636_424]


def test_describe_prints_the_whole_of_it():
  text = describe.describe(quickstart.get_config())
  for expected in ('10 classes', '151,690', '3 x 832', '33,891', '188,077'):
    assert expected in text
  assert 'Routed, predictor counted: 0.003966 to 0.01409 GMACs' in text


@pytest.mark.parametrize('name', ['data', 'model', 'seed', 'reset_head'])
def test_a_config_without_a_field_is_named(tmp_path, name):
  config = quickstart.get_config()
  del config[name]

  def convert():
    weights.import_torch(config, 'no.safetensors', str(tmp_path / 'run'))

  reads = [convert]
  if name in ('data', 'model'):
    reads.append(lambda: describe.describe(config))
  for read in reads:
    with pytest.raises(UserError, match=f'config.{name} is missing'):
      read()


def test_describe_prints_the_exits():
  text = describe.describe(cifar10_ranet_tiny.get_config())
  assert 'exit 1     347,050    8.4      26.4' in text
  assert 'exit 6   1,753,840   31.7     100.0' in text


def test_a_routed_stage_needs_a_predictor(tmp_path, data_dir):
  config = quickstart.get_config()
  config.data.data_dir = data_dir
  with config.unlocked():
    config.model.predictor = None
  with pytest.raises(UserError, match='a routed stage needs a predictor'):
    train.train(config, str(tmp_path))


def test_fields_that_an_older_run_did_not_have_are_filled(tmp_path):
  """A config.json of 0.4 lacks what 0.5 added to the section of data."""
  config = settings.plain(quickstart.get_config())
  for field in ('max_pixels', 'keys'):
    del config['data'][field]
  settings.write_json(str(tmp_path / 'config.json'), config)
  found = workdir.read_config(str(tmp_path))
  settings.call(Data, found.data, 'config.data')
  assert settings.plain(found) == settings.plain(quickstart.get_config())
  with pytest.raises(UserError, match='config.data.max_pixels is missing'):
    settings.call(Data, config['data'], 'config.data')


def test_photographs_are_cropped_as_their_side_says():
  for options, px in (
    ([], 192),
    (['--config.model.image_px=224'], 268),
    (['--config.model.image_px=224', '--config.data.resize_px=0'], 0),
  ):
    line = ['python', '-m', 'drnet_jax.main', '--config=configs/photos.py']
    config = parse(line + options)
    assert settings.plain(config.data)['resize_px'] == px
