# SPDX-License-Identifier: Apache-2.0
"""What meets what: data, models, runs and checkpoints that do not belong."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import _NETWORK, tiny_trained
from PIL import Image

from configs import smoke
from drnet_jax import mesh as mesh_lib
from drnet_jax import settings
from drnet_jax.choosing import record as record_lib
from drnet_jax.data import classes
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import NotHeldOut, UserError
from drnet_jax.run import calibrate, evaluate, train, weights, workdir
from drnet_jax.run.checkpoint import Checkpoints
from drnet_jax.run.recording import Subject
from drnet_jax.steps import optim

NAMES = ('ant', 'bee', 'cat', 'dog', 'eel')


def photos(path, names=NAMES, splits=('train', 'held', 'val')):
  """A folder of grey images, three of each class, each class of its shade."""
  for split in splits:
    for i, name in enumerate(names):
      folder = path / split / name
      folder.mkdir(parents=True)
      for j in range(3):
        shade = 40 * NAMES.index(name) + j if name in NAMES else 250
        shade += 5 * (split == 'held')  # other images than the test's
        Image.new('L', (40, 40), shade).save(folder / f'{i}{j}.png')
  return str(path)


def make_config(data_dir):
  config = smoke.get_config()
  config.data.update(
    name='folder',
    data_dir=data_dir,
    train_split='train',
    validation_split='held',
    test_split='val',
    augmentation='random_resized_crop',
    least_crop=0.08,
    epoch_images=0,
    least_epoch_images=0,
  )
  config.eval_batch_size = 8
  config.model.base = config.model.predictor = _NETWORK
  config.model.image_px, config.model.resolutions = 32, (16, 24, 32)
  for stage in (config.pretrain, config.finetune):
    stage.batch_size, stage.epochs = 8, 1
  config.finetune.objective.target_gmacs = 1e-5
  return config


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A folder of photos, and a run that has learned them (as far as it goes)."""
  path = tmp_path_factory.mktemp('base')
  config = make_config(photos(path / 'photos'))
  workdir.begin(str(path / 'run'), config, NAMES)
  trained = tiny_trained()
  with Checkpoints(str(path / 'run'), 'finetune', keep=1) as checkpoints:
    checkpoints.save_weights(7, trained.params, trained.batch_stats)
  return path


def takes_over(base, path):
  """Copies a run and its data to `path`, and returns the run's."""
  shutil.copytree(base, path, dirs_exist_ok=True)
  config = make_config(str(path / 'photos'))
  settings.write_json(str(path / 'run/config.json'), settings.plain(config))
  return path / 'run'


@pytest.fixture
def spoilable(base, tmp_path):
  """A copy of the run, its config and its data, to spoil."""
  path = str(takes_over(base, tmp_path))
  return path, workdir.read_config(path), tmp_path / 'photos'


def record_of(path, *overrides):
  subject = Subject(path, overrides)
  return subject.record(subject.data.test_split, 'test')


CHANGES = {
  'renamed': "renamed: 'cat' is now 'zebra'",
  'added': "added: 'fly'",
  'removed': "missing: 'cat'",
}


def change(photos, how):
  for split in photos.iterdir():
    if how == 'renamed':
      (split / 'cat').rename(split / 'zebra')
    elif how == 'added':
      shutil.copytree(split / 'cat', split / 'fly')
    else:
      shutil.rmtree(split / 'cat')


@pytest.mark.parametrize('how', CHANGES)
def test_classes_that_change_are_named_wherever_data_meets_a_model(
  spoilable, how
):
  path, config, data = spoilable
  before = {p: p.read_bytes() for p in data.parent.rglob('*.json')}
  change(data, how)
  if how == 'renamed':  # the order of its place must stay: it does not
    expected = "added: 'zebra'; missing: 'cat'"
  else:
    expected = CHANGES[how]
  for meet in (
    lambda: evaluate.evaluate(path),
    lambda: train.train(config, path),
    lambda: workdir.open_split(path, config, 'held', NAMES),
  ):
    with pytest.raises(
      UserError, match=f'other classes .*{expected}.*class_map'
    ):
      meet()
  assert before == {p: p.read_bytes() for p in data.parent.rglob('*.json')}


def test_a_difference_in_words():
  for data, words in (
    (NAMES, ''),
    (('ant', 'bee', 'zebra', 'dog', 'eel'), CHANGES['renamed']),
    ((*NAMES, 'fly'), CHANGES['added']),
    (('ant', 'bee', 'dog', 'eel'), CHANGES['removed']),
    (NAMES[::-1], 'the same names, but in another order'),
  ):
    assert classes.difference(NAMES, data) == words
  many = classes.difference(NAMES, [f'n{i}' for i in range(9)])
  assert "'n4' and 4 more; missing: 'ant'" in many


def test_labels_follow_names_and_a_map_on_purpose(spoilable, tmp_path):
  path, _, data = spoilable
  expected = record_of(path)
  kept = tmp_path / 'classes.txt'
  kept.write_text('\n'.join(NAMES[::-1]))
  found = record_of(path, f'--config.data.classes={kept}')
  assert found.label.tolist() == [i for i in range(5)[::-1] for _ in range(3)]
  order = np.argsort(found.label, kind='stable')
  np.testing.assert_array_equal(found.predicted[order], expected.predicted)

  change(data, 'renamed')
  shutil.rmtree(data / 'val' / 'bee')
  rename = tmp_path / 'map.json'
  rename.write_text(json.dumps({'zebra': 'cat'}))
  found = record_of(path, f'--config.data.class_map={rename}')
  assert sorted(set(found.label.tolist())) == [0, 2, 3, 4]
  rename.write_text(json.dumps({'zebra': 'tiger'}))
  with pytest.raises(UserError, match="added: 'tiger'; missing: 'bee', 'cat'"):
    record_of(path, f'--config.data.class_map={rename}')
  rename.write_text('["zebra"]')
  with pytest.raises(UserError, match='class_map = .* is not of the form'):
    record_of(path, f'--config.data.class_map={rename}')


def test_weights_of_a_run_with_other_classes_lose_their_head(spoilable):
  path, _, _ = spoilable
  trained, mesh = tiny_trained(), mesh_lib.create(1)
  fresh = tiny_trained(spread=0.0)
  others = ('ant', 'bee', 'cat', 'dog', 'fox')

  def load(names, reset_head):
    return weights.load(
      path,
      trained.model,
      (fresh.params, fresh.batch_stats),
      mesh,
      class_names=names,
      reset_head=reset_head,
    )[0]['base']

  with pytest.raises(UserError, match="'eel' is now 'fox'.*reset_head=True"):
    load(others, False)
  same, reset = load(NAMES, False), load(others, True)
  heads = [np.asarray(x['head']['kernel']) for x in (same, reset)]
  np.testing.assert_array_equal(
    heads[0], trained.params['base']['head']['kernel']
  )
  np.testing.assert_array_equal(
    heads[1], fresh.params['base']['head']['kernel']
  )


def test_a_checkpoint_knows_its_classes(spoilable):
  path, _, _ = spoilable
  settings.write_json(f'{path}/classes.json', NAMES[::-1])
  with pytest.raises(UserError, match='other classes than classes.json.*order'):
    record_of(path)
  os.remove(f'{path}/classes.json')
  with pytest.raises(UserError, match='classes.json cannot be read'):
    record_of(path)


def test_data_that_moved_and_no_training_split(spoilable):
  path, config, data = spoilable
  moved = data.parent / 'elsewhere'
  expected = record_of(path)
  data.rename(moved)
  shutil.rmtree(moved / 'train')
  with pytest.raises(UserError, match='photos'):
    record_of(path)
  found = record_of(path, f'--config.data.data_dir={moved}')
  np.testing.assert_array_equal(found.predicted, expected.predicted)
  assert workdir.read_config(path).data.data_dir == str(
    data
  )  # for good: resume
  with pytest.raises(UserError, match='as the run was trained'):
    record_of(path, '--config.seed=3')


def set_aside(path, config):
  """Has the run hold five images out, for the report too, and notes which."""
  config.data.update(
    held_out=5, validation_split='held_out', test_split='held_out'
  )
  settings.write_json(f'{path}/config.json', settings.plain(config))
  data = settings.call(Data, config.data, 'config.data')
  os.rename(f'{path}/checkpoints', f'{path}/away')  # it is not trained yet
  workdir.keep_held_out(path, data.open('train', NAMES).examples)
  os.rename(f'{path}/away', f'{path}/checkpoints')


def test_images_that_were_trained_on_are_not_held_out(spoilable):
  """A draw depends on what there is: one image more, and it is another."""
  path, config, data = spoilable
  overrides = ('--config.data.held_out=5', '--config.data.test_split=held_out')
  with pytest.raises(NotHeldOut, match='without holding images out'):
    record_of(path, *overrides)
  set_aside(path, config)
  assert len(record_of(path).label) == 5
  with pytest.raises(NotHeldOut, match='other images than are held out now'):
    record_of(path, '--config.data.test_split=held_out_test')
  moved = data.rename(data.parent / 'moved')
  there = f'--config.data.data_dir={moved}'
  assert len(record_of(path, there).label) == 5
  moved.rename(data)
  Image.new('L', (40, 40), 3).save(data / 'train' / 'ant' / '00b.png')
  with pytest.raises(NotHeldOut, match='other images than are held out now'):
    evaluate.evaluate(path)
  # What was put there, `convert` for one, has seen nothing.
  os.rename(f'{path}/checkpoints/finetune', f'{path}/checkpoints/initial')
  assert len(record_of(path).label) == 5


def test_weights_to_begin_with_have_not_seen_what_is_held_out(
  spoilable, tmp_path
):
  path, config, data = spoilable
  new, mine = str(tmp_path / 'new'), config.copy_and_resolve_references()
  mine.init_from = path
  mine.data.update(held_out=3, validation_split='held_out')
  where = f"init_from = '{path}' was trained on images of 'held_out'"
  for _ in range(2):  # nothing was held out; fewer
    with pytest.raises(NotHeldOut, match=where):
      train.train(mine, new)
    set_aside(path, config)
    mine.data.held_out = 8
  assert not os.path.exists(new)

  def check(**changes):
    mine.data.update(changes)
    of = settings.call(Data, mine.data, 'config.data')
    split = of.open('held_out', NAMES).examples
    weights.check_unseen(path, of, {'held_out': split})

  with pytest.raises(NotHeldOut):
    check(held_out=6)
  check(held_out=5)
  shutil.copytree(data, tmp_path / 'moved')
  check(data_dir=str(tmp_path / 'moved'), held_out=6)  # nobody can tell


def test_policies_are_not_set_on_what_was_trained_on(spoilable):
  path, _, _ = spoilable
  with pytest.raises(NotHeldOut, match="'train', .*networks were trained on"):
    calibrate.calibrate(Subject(path), split='train')
  os.rename(f'{path}/checkpoints/finetune', f'{path}/checkpoints/initial')
  calibrate.check_held_out('train', Subject(path))


def test_an_evaluation_says_that_it_is_of_trained_images(spoilable, capsys):
  path, _, _ = spoilable
  evaluate.evaluate(path)
  assert 'trained on these' not in capsys.readouterr().out
  evaluate.evaluate(path, ('--config.data.test_split=train',))
  assert '/train, 15 images; it was trained on these' in capsys.readouterr().out


def test_an_image_more_is_another_record(spoilable):
  path, _, data = spoilable
  record = record_of(path)
  assert Subject(path).is_current(record, 'val')
  Image.new('L', (40, 40), 3).save(data / 'val' / 'ant' / '00b.png')
  assert not Subject(path).is_current(record, 'val')
  shutil.rmtree(data)  # not at hand: as they were
  assert Subject(path).is_current(record, 'val')


def test_what_is_left_of_an_evaluation_is_of_its_images(spoilable):
  path, _, data = spoilable
  report = data.parent / 'run' / 'report'
  before = evaluate.evaluate(path)
  assert (report / workdir.PICTURES).exists()
  Image.new('L', (40, 40), 3).save(data / 'val' / 'ant' / '00b.png')
  assert len(Subject(path).test_record().label) == len(before.label) + 1
  assert len(record_lib.load(report / 'record.npz').label) == len(before.label)
  (report / 'evaluation.json').unlink()
  calibrate.calibrate(Subject(path)).write()
  kept = record_lib.load(report / 'record.npz')
  assert len(kept.label) == len(before.label) + 1
  assert not (report / workdir.PICTURES).exists()  # of other indices
  with open(report / 'evaluation.json') as file:
    assert json.load(file)['origin'] == 'stage finetune, step 7'
  (report / 'record.npz').write_bytes(b'damaged')
  calibrate.calibrate(Subject(path), kept).write()
  assert record_lib.load(report / 'record.npz').origin == kept.origin


def test_a_calibration_of_other_images_is_kept(spoilable, capsys):
  path, config, _ = spoilable
  config.data.validation_split = 'val'  # of the report
  settings.write_json(f'{path}/config.json', settings.plain(config))
  evaluate.evaluate(path)
  assert 'Not calibrated: policies would be set' in capsys.readouterr().out
  calibrate.calibrate(Subject(path), split='held').write()
  evaluate.evaluate(path)
  assert 'Not calibrated again: policies' in capsys.readouterr().out


FREE = {
  'data.threads': 3,
  'data.workers': 2,
  'data.max_bad_images': 9,
  'data.data_dir': '/elsewhere',
  'log_every_steps': 7,
  'checkpoint_every_epochs': 0.5,
  'keep_checkpoints': 5,
  'eval_batch_size': 16,
  'parameter_shards': 2,
  'pretrain.schedule.lr': 1e-5,
  'finetune.optimizer.clip_norm': 1.0,
  'finetune.eval_every_epochs': 2,
}


def test_what_may_change_is_recorded_and_the_rest_refused(spoilable):
  path, config, _ = spoilable
  for field, value in FREE.items():
    config.update_from_flattened_dict({field: value})
  changed = workdir.begin(path, config, NAMES)
  assert {k.removeprefix('config.'): v[1] for k, v in changed.items()} == FREE
  workdir.note(path, 'train', changed)
  was, now = workdir.sessions(path)[-1]['changed'][
    'config.pretrain.schedule.lr'
  ]
  assert (was, now) == (smoke.get_config().pretrain.schedule.lr, 1e-5)
  assert workdir.read_config(path).data.data_dir == '/elsewhere'
  assert workdir.begin(path, config, NAMES) == {}
  for field, value in (
    ('seed', 1),
    ('pretrain.schedule.warmup_epochs', 3.0),
    ('finetune.optimizer.momentum', 0.5),
    ('data.images_per_class', 2),
  ):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f'another config: config.{field} = '):
      workdir.begin(path, other, NAMES)
  config.finetune.epochs = 5
  with pytest.raises(
    UserError, match=f'for longer.*init_from={path}, .*reset_head=False'
  ):
    workdir.begin(path, config, NAMES)


def test_clipping_may_begin_in_the_middle_of_a_run():
  settings_ = {
    'name': 'adamw',
    'momentum': 0.9,
    'weight_decay': 0.1,
    'decay_norms_and_biases': False,
    'predictor_lr': 1.0,
    'head_lr': 1.0,
    'lr': lambda step: 0.1,
    'trains': ('base',),
    'accumulate': 1,
  }
  params = {'base': {'kernel': np.ones((2, 2), np.float32)}}
  plain = optim.create(clip_norm=0.0, **settings_)
  clipped = optim.create(clip_norm=1e-3, **settings_)
  state = plain.init(params)
  grads = {'base': {'kernel': np.full((2, 2), 1e6, np.float32)}}
  _, after = clipped.update(grads, state, params)
  import jax

  assert jax.tree.structure(after) == jax.tree.structure(state)
  largest = max(float(abs(x).max()) for x in jax.tree.leaves(after))
  assert largest < 2  # moments of a gradient of norm 1e-3, and the count


def spoil(path):
  folder = f'{path}/checkpoints/finetune/7/weights'
  for where, _, names in os.walk(folder):
    for name in names:
      if '/d' in where or name.startswith('manifest'):
        with open(os.path.join(where, name), 'r+b') as file:
          file.truncate(10)


def test_only_a_damaged_checkpoint_is_to_be_deleted(spoilable, monkeypatch):
  path, config, _ = spoilable
  mesh = mesh_lib.create(1)
  config.model.base.width = 8
  settings.write_json(f'{path}/config.json', settings.plain(config))
  with pytest.raises(UserError, match='another model: .*there') as error:
    workdir.load(path, mesh)
  assert 'Delete' not in str(error.value)
  config.model.base.width = 4
  settings.write_json(f'{path}/config.json', settings.plain(config))
  with monkeypatch.context() as patch:
    for raised, told in (
      (PermissionError(13, 'Permission denied'), 'permission is denied'),
      (MemoryError(), 'not enough memory'),
      (RuntimeError('RESOURCE_EXHAUSTED: Out of memory'), 'not enough memory'),
      (OSError(5, 'Input/output error'), 'cannot be read'),
    ):

      def restore(*_, error=raised, **__):
        raise ValueError('restoring failed') from error

      patch.setattr('orbax.checkpoint.CheckpointManager.restore', restore)
      with pytest.raises(UserError, match=told) as error:
        workdir.load(path, mesh)
      assert 'Delete' not in str(error.value)
  spoil(path)
  with pytest.raises(UserError, match=r'finetune/7 is damaged .*Delete'):
    workdir.load(path, mesh)


def test_the_advice_after_a_nan_works(base, tmp_path):
  """Also where the newest checkpoint holds what the loss broke on."""
  config = make_config(str(base / 'photos'))
  config.stages = ('pretrain',)
  config.pretrain.epochs, config.pretrain.schedule.warmup_epochs = 4, 0.0
  config.keep_checkpoints = 4
  config.pretrain.optimizer.name = 'sgd'
  path = str(tmp_path / 'run')
  config.log_every_steps = 1
  for lr, every, said, left in (
    (1e30, 4.0, 'the loss of step 2', []),
    (1e30, 1.0, 'validate', []),
    (1e-3, 1.0, '', [1, 2, 3, 4]),
  ):
    config.pretrain.schedule.lr = lr
    config.pretrain.eval_every_epochs = config.checkpoint_every_epochs = every
    if said:
      with pytest.raises(UserError, match=f'pretrain: {said}.* none yet'):
        train.train(config, path)
    else:
      train.train(config, path)
    with Checkpoints(path, 'pretrain', keep=None) as checkpoints:
      assert checkpoints.steps() == left
