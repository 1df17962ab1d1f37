# SPDX-License-Identifier: Apache-2.0
"""No field of any config is taken at a value that it cannot have."""

import copy
import importlib
import math
from typing import Literal

import ml_collections
import numpy as np
import pytest
from absl import flags

from drnet_jax import models, settings
from drnet_jax.commands import cli
from drnet_jax.errors import UserError
from drnet_jax.run import train

CONFIGS = (
  'quickstart',
  'in1k',
  'in1k_fixed',
  'in1k_mobilenet_v2',
  'imagenette',
  'cifar10_ranet_tiny',
)
DRAWS = 3  # of each field
NOT_NUMBERS = ('3', math.nan, math.inf, -math.inf, True, None, (1,), {'a': 1})
WRONG = {
  bool: ('False', 2, math.nan, ()),
  int: (*NOT_NUMBERS, -1, 10**30),
  float: (*NOT_NUMBERS, -1.0, -(10**400)),
  str: (7, math.nan, True, ('a',), {'a': 1}),
  tuple: (7, 'ab', (math.nan,) * 3, ('a', 'b', 'c'), (-math.inf,), {'a': 1}),
}


def leaves(section, path='config'):
  for name, value in section.items():
    if isinstance(value, dict):
      yield from leaves(value, f'{path}.{name}')
    else:
      yield f'{path}.{name}', value


def changed(fields, path, value):
  fields = section = copy.deepcopy(fields)
  *sections, name = path.split('.')[1:]
  for part in sections:
    section = section[part]
  section[name] = value
  return ml_collections.ConfigDict(fields)


def check(config):
  """What a command does before it looks for data."""
  models.create(train.read(config).model, num_classes=10)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_field_refuses_what_it_cannot_be(name):
  fields = importlib.import_module(f'configs.{name}').get_config().to_dict()
  rng, seen, taken = np.random.default_rng(0), 0, []
  for path, right in leaves(fields):
    wrong = WRONG.get(type(right), ())  # none of a predictor that is None
    for i in rng.permutation(len(wrong))[:DRAWS]:
      seen += 1
      try:
        check(changed(fields, path, wrong[i]))
        taken.append((path, wrong[i]))
      except UserError as error:
        if path not in str(error):
          taken.append((path, wrong[i], str(error)))
  assert not taken and seen > 100


@pytest.mark.parametrize(
  'hint, right, wrong',
  [
    (settings.Share, (0, 1, 0.5), (-1e-9, 1.1, math.nan, '0', True)),
    (settings.BelowOne, (0, 0.999), (1, 1.5)),
    (settings.Positive, (1e-9, 3), (0, math.inf)),
    (settings.Natural, (1, 2**31 - 1), (0, 1.0, 2**31)),
    (tuple[()] | tuple[int, int], ((), [2, 9]), ((2,), (2, 9, 1), ('a', 1))),
    (tuple[int, ...], ((), (1, 2, 3), [4]), ((1, 'a'), 3, '12')),
    (Literal[2, 3], (2, 3), (4, 2.0, True, '2')),
  ],
)
def test_bounds(hint, right, wrong):
  for value in right:
    settings.check_values({'x': hint}, {'x': value}, 'config')
  for value in wrong:
    with pytest.raises(UserError, match=r'config\.x = .* is not '):
      settings.check_values({'x': hint}, {'x': value}, 'config')


def test_a_named_network_is_that_network():
  config = importlib.import_module('configs.quickstart').get_config()
  config.model.base.network = 'resnet18'
  with pytest.raises(
    UserError, match=r"base.stage_sizes is not a .*'resnet18'"
  ):
    check(config)
  with config.unlocked(), config.ignore_type():
    config.model.base = {'network': 'resnet18'}
  check(config)


def test_overrides_are_typed_and_only_of_the_data():
  config = importlib.import_module('configs.quickstart').get_config()
  fields = ('config.data.*',)
  found = settings.overridden(
    config,
    ['--config.data.data_dir=/new', '--config.data.threads=3'],
    fields,
  )
  assert (found.data.data_dir, found.data.threads) == ('/new', 3)
  assert config.data.data_dir == ''
  for wrong in ('--config.seed=1', '--config.data.threads', '--config.data'):
    with pytest.raises(UserError, match='as the run was trained'):
      settings.overridden(config, [wrong], fields)
  with pytest.raises(UserError, match='threads'):
    settings.overridden(config, ['--config.data.threads=many'], fields)


def test_a_config_is_found_by_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  file = importlib.import_module('configs.quickstart').__file__
  photos = importlib.import_module('configs.photos').__file__
  given = ['x', '--config=quickstart', '-config=photos:row', '--config.seed=1']
  expected = ['x', f'--config={file}', f'-config={photos}:row', given[-1]]
  assert cli.with_config(given) == expected
  # Neither a folder of configs, nor a path that is not there, nor a typo.
  for value in ('sets', 'configs/quickstart.py', 'quikstart', 'quikstart:row'):
    with pytest.raises(flags.Error, match='neither .* photos, quickstart'):
      cli.with_config([f'--config={value}'])
  (tmp_path / 'quickstart').write_text('')
  assert cli.with_config(['--config=quickstart']) == ['--config=quickstart']
