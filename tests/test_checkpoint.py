# SPDX-License-Identifier: Apache-2.0
"""What comes back from a checkpoint, however the devices lie."""

import shutil

import jax
import optax
import pytest
from conftest import tiny_model
from test_routed import assert_trees_close

from configs import smoke
from drnet_jax import mesh as mesh_lib
from drnet_jax.errors import UserError
from drnet_jax.run import workdir
from drnet_jax.run.checkpoint import Checkpoints
from drnet_jax.steps import state as state_lib

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
ROW = [{'loss': 0.1}, {'loss': 1 / 3}]


@pytest.fixture(scope='module')
def model():
  return tiny_model(num_classes=10, resolutions=(16, 32, 64), predictor_px=16)


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
  """A workdir of a stage with averaged weights: (path, state, average)."""
  path = str(tmp_path_factory.mktemp('run'))
  config = smoke.get_config()
  config.model.base.width = 4
  config.model.predictor.width = 4
  config.finetune.ema_decay = 0.9
  workdir.begin(path, config, tuple('0123456789'))
  mesh = mesh_lib.create(4, parameter_shards=2)
  abstract = state_lib.abstract(model, OPTIMIZER)
  state = jax.jit(
    lambda key: state_lib.begin(OPTIMIZER, *model.init(key)),
    out_shardings=mesh_lib.shardings(abstract, mesh),
  )(jax.random.key(0))
  average = jax.tree.map(lambda x: x + 1, state_lib.weights(state))
  with Checkpoints(path, 'finetune', keep=1) as checkpoints:
    checkpoints.save(7, state, average, ROW)
  return path, state, average


@pytest.mark.parametrize('devices, shards', [(8, 8), (1, 1)])
def test_restored_onto_another_mesh(model, saved, devices, shards):
  path, state, average = saved
  mesh = mesh_lib.create(devices, parameter_shards=shards)
  abstract = state_lib.abstract(model, OPTIMIZER)
  shardings = mesh_lib.shardings(abstract, mesh)
  with Checkpoints(path, 'finetune', keep=1) as checkpoints:
    ours, ours_average, row = checkpoints.restore(
      7, abstract, shardings, averages=True
    )
  assert row == ROW
  same = (jax.device_get(ours), jax.device_get(ours_average))
  assert_trees_close(same, (jax.device_get(state), jax.device_get(average)), 0)
  placed = jax.tree.map(lambda x, s: x.sharding == s, ours, shardings)
  assert all(jax.tree.leaves(placed))


def test_a_save_under_way_is_left_to_who_saves(saved, tmp_path):
  path = shutil.copytree(saved[0], tmp_path / 'run')
  under_way = path / 'checkpoints/finetune/9.orbax-checkpoint-tmp'
  shutil.copytree(path / 'checkpoints/finetune/7', under_way)
  trained = workdir.load(str(path), mesh_lib.create(1))
  assert trained.origin == 'stage finetune, step 7' and under_way.exists()
  with Checkpoints(str(path), 'finetune', keep=1) as checkpoints:
    assert checkpoints.steps() == [7] and not under_way.exists()


def test_averaged_weights_are_those_of_the_model(saved, caplog):
  path, _, average = saved
  with caplog.at_level('WARNING', logger='absl'):
    trained = workdir.load(path, mesh_lib.create(1))
  assert not caplog.records  # Orbax warns of items it has no handler for
  assert trained.has_router and trained.origin == 'stage finetune, step 7'
  ours = (trained.params, trained.batch_stats)
  assert_trees_close(ours, jax.device_get(average), 0)


def test_a_disk_without_room_is_named_before_writing(
  saved, tmp_path, monkeypatch
):
  _, state, _ = saved
  room = shutil.disk_usage(tmp_path)._replace(free=20_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: room)
  with Checkpoints(str(tmp_path), 'finetune', keep=1) as checkpoints:
    with pytest.raises(UserError, match='takes .* MB, and 0.0 MB are free.*on'):
      checkpoints.save(7, state, None, ROW)
    assert checkpoints.latest_step() is None
