# SPDX-License-Identifier: Apache-2.0
"""Whole runs: what a user does, and what can go wrong."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parse_commands
import pytest
from absl.testing import flagsaver
from conftest import QUICK, compilations, rows_of
from PIL import Image
from run_processes import start

from configs import smoke
from drnet_jax import mesh as mesh_lib
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing import scores
from drnet_jax.commands import cli, predict
from drnet_jax.errors import UserError
from drnet_jax.report import evaluated
from drnet_jax.run import evaluate, train, workdir
from drnet_jax.run.checkpoint import Checkpoints
from drnet_jax.serve.classifier import Classifier

STAGES = ('pretrain', 'finetune')
# Each takes a start, 20 s.
KILLS = int(os.environ.get('DRNET_JAX_KILLS', 2))
EPOCHS = 3
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def make_config(data_dir):
  config = smoke.get_config()
  # Smaller splits: they are evaluated in every epoch.
  config.data.update(
    data_dir=data_dir,
    validation_split='validation[:500]',
    test_split='test[:1000]',
  )
  return config


@pytest.fixture(scope='module')
def config(data_dir):
  return make_config(data_dir)


@pytest.fixture(scope='module')
def watched(config, tmp_path_factory):
  """A run, and (stage, programs compiled so far) at each of its saves."""
  path, found = str(tmp_path_factory.mktemp('finished')), []
  save = Checkpoints.save
  with compilations() as compiled, pytest.MonkeyPatch.context() as patch:

    def note(checkpoints, *arguments):
      save(checkpoints, *arguments)  # last in an epoch, after the validation
      found.append((os.path.basename(checkpoints.directory), len(compiled)))

    patch.setattr(Checkpoints, 'save', note)
    train.train(config, path)
  evaluate.evaluate(path)
  return path, found


@pytest.fixture(scope='module')
def finished(watched):
  """A workdir whose run was never cut off, trained and evaluated."""
  return watched[0]


def command(verb, *arguments, timeout=200):
  """Runs one of our command lines as a user would: a verb, or 'main'."""
  module = ['drnet_jax.main'] if verb == 'main' else ['drnet_jax', verb]
  environment = os.environ | {'XLA_FLAGS': ' '.join(QUICK)}
  return subprocess.run(
    [sys.executable, '-m', *module, *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def metrics(path):
  return rows_of(path, 'metrics.csv')


def copy_until(source, target, stage, step):
  """A workdir as it was when killed just after saving a step."""
  shutil.copytree(source, target)
  kept = os.path.join(target, 'checkpoints', stage)
  assert str(step) in os.listdir(kept)
  for name in os.listdir(kept):
    if int(name) > step:
      shutil.rmtree(os.path.join(kept, name))
  for later in STAGES[STAGES.index(stage) + 1 :]:
    shutil.rmtree(os.path.join(target, 'checkpoints', later))


def test_a_run_leaves_what_it_promises(finished):
  files = {
    os.path.relpath(os.path.join(folder, name), finished)
    for folder, _, names in os.walk(finished)
    for name in names
  }
  assert {
    'config.json',
    'classes.json',
    'metrics.csv',
    'report/evaluation.csv',
    'report/record.npz',
    'report/accuracy_cost.svg',
    'report/budgets.csv',
    'report/index.html',
    'calibration.json',
    'calibration.npz',
    'sessions.jsonl',
  } <= files
  assert any(f.startswith('tensorboard/finetune/events') for f in files)
  rows = metrics(finished)
  assert {r['stage'] for r in rows} == {'pretrain', 'finetune'}
  names = {r['metric'] for r in rows if r['stage'] == 'finetune'}
  assert {
    'train/entropy',
    'train/hinge',
    'train/share_r16',
    'train/learning_rate',
    'validation/routed_top1',
  } <= names


def test_nothing_is_compiled_after_the_first_epoch(watched):
  _, found = watched
  counts = {stage: [n for s, n in found if s == stage] for stage in STAGES}
  for stage, (first, *later) in counts.items():
    assert first and later == [first] * (EPOCHS - 1), stage


@pytest.mark.parametrize(
  'stage, step',
  [
    pytest.param('pretrain', 8, marks=[pytest.mark.slow, pytest.mark.soak]),
    ('finetune', 8),
  ],
)
def test_resumed_equals_uninterrupted(finished, config, tmp_path, stage, step):
  path = str(tmp_path / 'resumed')
  copy_until(finished, path, stage, step)
  # As a kill in mid-write would leave it.
  with open(os.path.join(path, 'metrics.csv'), 'a') as file:
    file.write('finetune,9,train/lo')
  train.train(config, path)
  assert metrics(path) == metrics(finished)
  assert_same_weights(path, finished)


def assert_same_weights(path, other):
  mesh = mesh_lib.create()
  ours, theirs = workdir.load(path, mesh), workdir.load(other, mesh)
  jax.tree.map(
    np.testing.assert_array_equal,
    (ours.params, ours.batch_stats),
    (theirs.params, theirs.batch_stats),
  )


def test_evaluation_table_matches_its_record(finished):
  record = record_lib.load(os.path.join(finished, 'report', 'record.npz'))
  assert len(record.label) == 1000
  found = rows_of(finished, 'report', 'evaluation.csv')
  rows = {row['policy']: row for row in found}
  chosen = record.top1[np.arange(1000), record.choice].mean()
  assert float(rows['router as trained']['top1']) == pytest.approx(chosen)
  best = evaluated.read(finished).found.policy
  expected = scores.score(best, record, 'best policy')
  assert float(rows['best policy']['top1']) == pytest.approx(expected.top1)
  assert float(rows['best policy']['gmacs']) == pytest.approx(expected.gmacs)
  # Rivals of a family may lie beyond the cost of the best policy.
  rivals = {'router', 'cascade', 'routed cascade'}
  assert set(rows) - rivals == {
    'fixed 16 px',
    'fixed 32 px',
    'fixed 64 px',
    'best policy',
    'router as trained',
    'best fixed',
    'random',
    'oracle',
  }


def test_classifier_agrees_with_the_evaluation(finished, config):
  record = record_lib.load(os.path.join(finished, 'report', 'record.npz'))
  classifier = Classifier.load(finished, runtime='jax', batch=4)
  assert classifier.policy == evaluated.read(finished).found.policy
  classifier.policy = classifier.contract.as_trained
  trained = workdir.load(finished, mesh_lib.create(1))
  source = train.Data(**config.data).open('test')
  encoded = [source.examples[i]['image'] for i in range(100)]
  found = classifier.predict(encoded)
  choice = record.choice[:100]
  sizes = [trained.model.resolutions[j] for j in choice]
  assert [p.size_px for p in found] == sizes
  rows = np.arange(100)
  assert [p.label for p in found] == record.predicted[rows, choice].tolist()
  np.testing.assert_allclose(
    [p.probability for p in found], record.confidence[rows, choice], atol=1e-5
  )
  expected = record.gmacs[choice] + record.costs.predictor
  np.testing.assert_allclose([p.gmacs for p in found], expected)


def predict_fails(workdir, images) -> None:
  """Runs the command here, which ends with exit status 2."""
  with flagsaver.flagsaver(workdir=workdir, runtime='onnx'):
    with pytest.raises(SystemExit) as stop:
      cli.run_command(lambda: predict.run(images))
  assert stop.value.code == 2


def test_predict_names_bad_files_and_answers_the_good(
  finished, tmp_path, capsys
):
  Image.new('L', (50, 70)).save(tmp_path / 'grey.png')
  Image.new('RGBA', (70, 50)).save(tmp_path / 'clear.png')
  (tmp_path / 'broken.png').write_bytes(b'not an image')
  gone = str(tmp_path / 'gone.png')
  capsys.readouterr()
  predict_fails(finished, [gone, str(tmp_path)])
  out, err = capsys.readouterr()
  assert 'grey.png' in out and 'clear.png' in out
  missing, unreadable = err.strip().splitlines()[-2:]
  assert missing == f'error: file or pattern {gone} does not exist'
  assert 'cannot read' in unreadable and 'broken.png' in unreadable
  assert 'Traceback' not in err


def test_predict_needs_images(tmp_path, capsys):
  with pytest.raises(UserError, match='holds no image'):
    predict.find_images([str(tmp_path)])
  with pytest.raises(UserError, match='nothing.png does not exist'):
    predict.find_images([str(tmp_path / 'nothing.png')])
  with pytest.raises(UserError, match='name an image'):
    predict.find_images([])
  for name in ('cat/a.png', 'dog/b.png', 'dog/notes.txt', 'c.png'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
  found, wrong = predict.find_images([str(tmp_path / '*')])
  assert not wrong
  assert [os.path.relpath(x, tmp_path) for x in found] == [
    'c.png',
    'cat/a.png',
    'dog/b.png',
  ]
  predict_fails(str(tmp_path), [__file__])
  assert 'not a workdir of drnet_jax' in capsys.readouterr().err


def changed(config, **fields):
  config = config.copy_and_resolve_references()
  for path, value in fields.items():
    *sections, name = path.split('__')
    section = config
    for part in sections:
      section = section[part]
    with section.unlocked():
      if value is None:
        del section[name]
      else:
        section[name] = value
  return config


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'learning_rate': 1.0}, 'config.learning_rate is not a known field'),
    ({'finetune__objective__eta': None}, 'finetune.objective.eta is missing'),
    ({'finetune__objective__etta': 1}, 'did you mean eta'),
    ({'pretrain': None}, 'config.pretrain is missing'),
    ({'stages': ('pretrain', 'finetune', 'pretrain')}, 'names a stage twice'),
    ({'model__resolutions': (32, 16, 64)}, 'ascending order'),
    ({'model__resolutions': (64,)}, 'at least two sizes'),
    ({'model__image_px': 32}, 'must be 64'),
    ({'finetune__batch_size': 30}, 'cannot be divided over 8 devices'),
    ({'eval_batch_size': 7}, 'config.eval_batch_size = 7'),
    ({'model__base__network': 'resnet1'}, "network = 'resnet1'"),
    ({'model__base__width': None, 'model__base__wide': 1}, 'wide'),
    ({'model__predictor__stem': 'foo'}, "predictor.stem = 'foo' is not one"),
    ({'model__base__width': 0}, 'base.width = 0 is not a whole'),
    ({'model__std': (0.0, 1.0, 1.0)}, r'std = .* in \(0, inf\)'),
    ({'finetune__objective__tau': (1.0, 0.0)}, r'tau = .* in \(0, inf\)'),
    ({'pretrain__step': 'train'}, "step = 'train'"),
    ({'finetune__epochs': 0}, r'epochs = 0.0 is not a number in \(0'),
    ({'finetune__epochs': 1e-4}, 'less than one step'),
    ({'data__name': 'scaled_letters'}, 'scaled_letters'),
  ],
)
def test_a_wrong_config_is_named(config, tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    train.train(changed(config, **fields), str(tmp_path / 'run'))


def test_unknown_field_on_the_command_line(tmp_path):
  done = command(
    'main',
    '--config=configs/smoke.py',
    '--config.finetune.epoch=3',
    f'--workdir={tmp_path}',
  )
  assert done.returncode == 2
  assert done.stderr.strip().splitlines() == [
    'error: --config has no field \'epoch\' Did you mean "epochs" instead of '
    '"epoch"?'
  ]


def test_a_set_needs_one_of_its_rows():
  without, unknown = parse_commands.mistakes(
    [
      ['drnet_jax.main', f'--config=configs/sets/in1k.py{row}', '--workdir=x']
      for row in ('', ':none')
    ],
    cwd=ROOT,
  )
  assert 'names a set: add a colon and a row' in without
  assert "no row 'none'" in unknown
  for said in (without, unknown):
    assert len(said.strip().splitlines()) == 1


def test_workdir_of_another_model(finished, config):
  other = changed(config, model__base__width=16)
  with pytest.raises(UserError, match='config.model.base.width = 16 here, 8'):
    train.train(other, finished)


def test_a_workdir_without_checkpoints_may_change_its_mind(config, tmp_path):
  workdir.begin(str(tmp_path), config, ('0', '1'))
  other = changed(config, model__base__width=16)
  workdir.begin(str(tmp_path), other, ('0', '1'))
  assert workdir.read_config(str(tmp_path)).model.base.width == 16


def test_half_deleted_checkpoint(finished, config, tmp_path):
  path = str(tmp_path / 'run')
  copy_until(finished, path, 'finetune', 8)
  weights = os.path.join(path, 'checkpoints', 'finetune', '8', 'weights')
  for name in os.listdir(weights):
    if name != '_METADATA':
      target = os.path.join(weights, name)
      shutil.rmtree(target) if os.path.isdir(target) else os.remove(target)
  with pytest.raises(UserError, match='finetune/8 is damaged'):
    train.train(config, path)


def test_collapse_is_warned_of(config, tmp_path, capsys):
  path = str(tmp_path / 'run')
  only = changed(
    config,
    stages=('finetune',),
    finetune__epochs=1,
    finetune__schedule__lr=0.0,
    finetune__objective__gradient='chosen',
    model__predictor__network='test_run:Stubborn',
  )
  for name in ('stage_sizes', 'width', 'stem', 'patch_px', 'zero_init'):
    with only.unlocked():
      del only.model.predictor[name]
  train.train(only, path)
  assert 'collapsed onto one size' in capsys.readouterr().out


class Stubborn(nn.Module):
  """A predictor that always wants the smallest size."""

  num_classes: int

  @nn.compact
  def __call__(self, x, *, train):
    del train
    bias = self.param('bias', nn.initializers.zeros, (self.num_classes,))
    wish = jax.nn.one_hot(0, self.num_classes) * 1e3
    return jnp.zeros((len(x), 1)) + bias + wish


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments(finished, config, tmp_path):
  """kill -9, again and again: the numbers are those of a run never killed."""
  path, rng = str(tmp_path / 'run'), np.random.default_rng(0)
  kills = 0
  # Some of the kills fall into the writing of a checkpoint, the others (at any
  # sign of life) mostly into starting up and compiling.
  in_writing = (1, 4, 7)
  while True:
    (process,) = start(path, config, devices=jax.device_count())
    writing = kills in in_writing
    begun = _wait_for_progress(process, path, writing=writing)
    if kills < KILLS and begun:
      time.sleep(rng.uniform(0.0, 0.3 if writing else 1.5))
      process.kill()
      process.join()
      kills += process.exitcode == -signal.SIGKILL
    else:
      process.join()
      assert process.exitcode == 0
      break
  assert kills == KILLS
  assert metrics(path) == metrics(finished)
  assert_same_weights(path, finished)


def _wait_for_progress(process, path, *, writing: bool) -> bool:
  """Waits until the run touches its checkpoints; False once it has ended.

  With `writing`, until it has begun to write one.
  """
  start = time.time()
  while process.is_alive():
    for folder, _, _ in os.walk(os.path.join(path, 'checkpoints')):
      step = os.path.basename(folder)[:1].isdigit()
      # A temporary folder may be renamed between the two calls.
      with contextlib.suppress(FileNotFoundError):
        if os.path.getmtime(folder) > start and (step or not writing):
          return True
    time.sleep(0.02)
  return False
