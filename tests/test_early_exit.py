# SPDX-License-Identifier: Apache-2.0
"""Real early exit does what a simulated one says."""

import dataclasses
import json
import os
import shutil

import conftest
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import (
  RANET,
  compilations,
  encoded,
  pack,
  recorded,
  rows_of,
  tiny_exits,
  tiny_trained,
)
from PIL import Image

from configs import cifar10_ranet_tiny
from drnet_jax import settings
from drnet_jax.bench import inference, subjects
from drnet_jax.bench import models as models_bench
from drnet_jax.choosing import calibration as calibration_lib
from drnet_jax.choosing import exit_shares, policy, scores, search
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.policy import Policy
from drnet_jax.commands import calibrate, compare, predict
from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.run import calibrate as calibrate_lib
from drnet_jax.run import evaluate, train, workdir
from drnet_jax.run.recording import Subject
from drnet_jax.serve.answers import Failure
from drnet_jax.serve.classifier import Classifier


@pytest.fixture(scope='module')
def trained():
  return tiny_exits()


@pytest.fixture(scope='module')
def classifier(trained):
  return Classifier.of(trained, runtime='jax', batch=8)


def pictures(count, seed=0):
  rng = np.random.default_rng(seed)
  low = rng.integers(0, 200, (count, 1, 1, 3))
  noise = rng.integers(0, 56, (count, 16, 16, 3))
  return (low + noise).astype(np.uint8)


@pytest.fixture(scope='module')
def hundred_and_fifty(trained):
  images = pictures(150)
  return images, recorded(trained, images)


@pytest.fixture(scope='module')
def two_hundred(trained):
  images = pictures(200, seed=11)
  return images, recorded(trained, images)


# First, while the classifier is fresh.
def test_nothing_is_compiled_after_loading(classifier):
  classifier.policy = Policy((0, 1, 2, 3), None, (0.5, 0.5, 0.5))
  with compilations() as compiled:
    for count in (1, 2, 7, 40):
      classifier.predict(pictures(count))
  assert not compiled


@pytest.mark.parametrize('ratio', [0.2, 0.7, 1.5])
def test_real_is_simulated(classifier, hundred_and_fifty, ratio):
  images, said = hundred_and_fifty
  chosen = exit_shares.by_ratio(said, ratio)
  # Midway between two images, so that no rounding decides.
  chosen = dataclasses.replace(
    chosen, stop=tuple((np.array(chosen.stop) - 1e-5).tolist())
  )
  decided = policy.decide(chosen, said, said.costs)
  assert len(set(decided.last.tolist())) == 4, 'the test should use every exit'
  classifier.policy = chosen
  answers = classifier.predict(iter(images))
  names = said.options.names
  assert [x.option for x in answers] == [names[k] for k in decided.last]
  np.testing.assert_allclose(
    [x.probabilities for x in answers],
    said.probabilities[np.arange(150), decided.last],
    atol=1e-5,
  )
  np.testing.assert_allclose([x.gmacs for x in answers], decided.cost)
  for image, together in zip(images[:12], answers, strict=False):
    (alone,) = classifier.predict([image])
    assert alone.ran == together.ran
    np.testing.assert_allclose(
      alone.probabilities, together.probabilities, atol=1e-6
    )


@pytest.mark.parametrize('answer', ('last', 'pooled'))
@pytest.mark.parametrize('path', [(0, 1, 2, 3), (0, 3), (1, 2)])
def test_any_path_through_the_exits(classifier, two_hundred, path, answer):
  """Also one that passes exits without a look, in streams too."""
  images, said = two_hundred
  limits = np.quantile(said.margin[:, path[:-1]], 0.5, axis=0)
  if answer == 'pooled' and path == (0, 3):
    with pytest.raises(KeyError, match='no mean'):
      policy.decide(
        Policy(path, None, tuple(limits), answer),
        dataclasses.replace(said, columns=said.columns[:4]),
        said.costs,
      )
  chosen = Policy(path, None, tuple(limits.tolist()), answer)
  decided = policy.decide(chosen, said, said.costs)
  classifier.policy = chosen
  answers = classifier.predict(images)
  expected = [said.options.names[path[k]] for k in decided.last]
  differ = [x.option != y for x, y in zip(answers, expected, strict=True)]
  assert sum(differ) <= 1
  for i, x in enumerate(answers):
    if not differ[i]:
      assert x.gmacs == pytest.approx(decided.cost[i])
      assert x.label == said.predicted[i, decided.column[i]]
  with classifier.stream(deadline_ms=1e5, batch=4) as stream:
    futures = [stream.submit(image) for image in images[:50]]
  assert [f.result().ran for f in futures] == [x.ran for x in answers[:50]]


def test_an_exit_for_all(classifier, trained):
  images = pictures(11, seed=1)
  p = recorded(trained, images).probabilities
  for k in range(1, 5):
    classifier.set_exit(k)
    answers = classifier.predict(images)
    assert {x.option for x in answers} == {f'exit {k}'}
    np.testing.assert_allclose(
      [x.probabilities for x in answers], p[:, k - 1], atol=1e-5
    )
  for wrong in (lambda: classifier.set_exit(5), lambda: classifier.set_size(8)):
    with pytest.raises(UserError, match='exit'):
      wrong()


def test_nothing_runs_after_an_exit(classifier, monkeypatch):
  ran = []
  run = classifier.engine.run

  def note(k, state):
    ran.append(k)
    return run(k, state)

  monkeypatch.setattr(classifier.engine, 'run', note)
  classifier.set_exit(2)
  classifier.predict(pictures(40))
  assert sorted(ran) == 5 * [0] + 5 * [1]  # batches of 8


def test_bad_files_leave_their_places(classifier):
  classifier.set_exit(1)
  good = list(pictures(20))
  images = [*good[:9], b'no image', *good[9:]]
  answers = classifier.predict(images, on_error='return')
  assert [isinstance(x, Failure) for x in answers].index(True) == 9
  np.testing.assert_array_equal(
    [x.label for i, x in enumerate(answers) if i != 9],
    [x.label for x in classifier.predict(good)],
  )
  with pytest.raises(UserError, match='image 9'):
    classifier.predict(images)
  assert classifier.predict([]) == []


def test_a_budget_is_met(classifier, trained):
  with pytest.raises(UserError, match='not calibrated'):
    classifier.set_budget(gmacs=1.0)
  said = recorded(trained, pictures(600))
  classifier.calibration = Calibration.of(said, split='a test')
  costs = said.costs.options
  images = pictures(600, seed=5)
  try:
    for share in (0.2, 0.5, 0.8):
      asked = costs[0] + share * (costs[-1] - costs[0])
      point = classifier.set_budget(gmacs=asked)
      assert point.gmacs <= asked
      spent = np.mean([x.gmacs for x in classifier.predict(images)])
      assert spent == pytest.approx(point.gmacs, rel=0.06)
    assert classifier.set_budget(gmacs=costs[0]).shares[0] == 1
    cheap = classifier.set_budget(accuracy=0.6)
    assert cheap.top1 >= 0.6 and cheap.cost < costs[-1]
    with pytest.raises(UserError, match='no milliseconds'):
      classifier.set_budget(ms=1)
  finally:
    classifier.calibration = None


def test_what_networks_with_exits_cannot(trained, classifier, tmp_path):
  with pytest.raises(UserError, match='runtime = .* in JAX only'):
    Classifier.of(trained, runtime='onnx')
  with pytest.raises(UserError, match='precision = .* in JAX only'):
    Classifier.of(trained, precision='bf16')
  with pytest.raises(UserError, match='cannot be exported'):
    classifier.export(str(tmp_path / 'out'), formats=('onnx',))


def test_a_ladder_of_both_methods(trained):
  sizes = tiny_trained(resolutions=(16, 32), has_router=False)
  classifier = Classifier.of_ladder(
    {'exits': trained, 'sizes': sizes}, runtime='jax', batch=8
  )
  images = pictures(60, seed=3)
  small, large = (
    recorded(trained, images),
    Classifier.of(sizes, runtime='jax', batch=8),
  )
  large.set_size(32)
  last = large.predict(images)
  first, third = small.margin[:, 0], small.margin[:, 2]
  a, b = (float(np.median(x)) + 1e-5 for x in (first, third))
  classifier.policy = Policy((0, 2, 5), None, (a, b))
  expected = np.where(first >= a, 0, np.where(third >= b, 1, 2))
  names = ('exits: exit 1', 'exits: exit 3', 'sizes: 32 px')
  answers = classifier.predict(images)
  assert [x.option for x in answers] == [names[k] for k in expected]
  assert len(set(expected.tolist())) == 3, 'the test should use every option'
  for k, (x, y) in enumerate(zip(answers, last, strict=True)):
    if expected[k] == 2:
      np.testing.assert_allclose(x.probabilities, y.probabilities, atol=1e-5)
      assert x.gmacs == pytest.approx(small.gmacs[2] + y.gmacs)


def test_a_router_after_exits_has_batches_of_its_own(trained):
  """The exits' engine takes more images at a time than the router's."""
  members = {
    'exits': trained,
    'sizes': tiny_trained(resolutions=(16, 32), image_px=32),
  }
  classifier = Classifier.of_ladder(members, runtime='jax')
  classifier.policy = classifier.contract.as_trained
  images = list(conftest.pictures(20, side=32))
  expected = classifier.predict(images)
  with classifier.stream(deadline_ms=1e5) as stream:
    answers = [stream.submit(x) for x in images]
  for x, y in zip(answers, expected, strict=True):
    assert x.result().label == y.label


# The commands, on a run that took no training.


def test_a_stage_that_fails_leaves_no_image_without_an_answer(
  classifier, monkeypatch
):
  """Nor those that waited in its pool from batches before.

  Seven of eight go on: those of the second batch fill the pool, and its stage
  starts while theirs is being fetched.
  """
  images = pictures(16, seed=13)
  classifier.set_exit(1)
  sure = [x.probability for x in classifier.predict(images)]
  order = np.argsort(sure)
  images = images[
    [*order[:2], order[14], *order[2:11], order[15], *order[11:14]]
  ]
  limit = float(np.sort(sure)[13:15].mean())
  run = classifier.engine.run

  def fails(option, inputs):
    if option:
      raise RuntimeError('out of memory')
    return run(option, inputs)

  count = len(classifier.contract.options)
  classifier.policy = Policy(
    tuple(range(count)), None, (limit,) * (count - 1), signal='probability'
  )
  with classifier.stream(deadline_ms=2000, batch=8) as stream:
    monkeypatch.setattr(classifier.engine, 'run', fails)
    futures = [stream.submit(image) for image in images]
  errors = [future.exception(timeout=5) for future in futures]
  assert sum(error is None for error in errors) == 2  # who left before
  assert not stream._open


@pytest.fixture(scope='module')
def run_with_exits(tmp_path_factory):
  """A workdir of a tiny network on a packed file of noise."""
  folder = tmp_path_factory.mktemp('ranet')
  path = pack(
    folder / 'noise.npz',
    [encoded(image) for image in pictures(96, seed=7)],
    label=np.arange(96) % 5,
    split=np.repeat([0, 1], 48),
    class_name=np.array([b'a', b'b', b'c', b'd', b'e']),
  )
  config = cifar10_ranet_tiny.get_config()
  with config.unlocked():
    config.model.network = RANET | {'first_blocks': 1, 'more_blocks': 1}
  config.model.image_px = 16
  config.data.update(
    name='packed',
    data_dir=path,
    test_split='val',
    held_out=16,
    epoch_images=32,
  )
  config.eval_batch_size = 16
  config.exits.update(epochs=2, batch_size=16, eval_every_epochs=1)
  path = str(folder / 'run')
  train.train(config, path)
  return path


def test_a_run_trains_evaluates_calibrates_and_predicts(
  run_with_exits, capsys, tmp_path
):
  evaluate.evaluate(run_with_exits)
  with open(os.path.join(run_with_exits, 'held_out.json')) as file:
    assert len(set(json.load(file)['rows'])) == 16
  names = {row['metric'] for row in rows_of(run_with_exits, 'metrics.csv')}
  assert {'train/top1_exit2', 'validation/fixed_exit_2_top1'} <= names
  with flagsaver.flagsaver(workdir=run_with_exits, measure='jax'):
    calibrate.run([])
  rows = rows_of(run_with_exits, 'report', 'budget.csv')
  assert [float(row['q']) for row in rows] == list(exit_shares.RATIOS)
  calibration = calibration_lib.read(run_with_exits)
  assert calibration.images == 16 and len(calibration.options) == 2
  for table in calibration.costs.values():
    assert list(table.options) == sorted(table.options)
  with flagsaver.flagsaver(
    workdirs=[run_with_exits],
    folder=str(tmp_path),
    settings=2,
    timed_images=8,
    timed_rounds=1,
  ):
    compare.run([])
  costs = [float(x['timed_gmacs']) for x in rows_of(tmp_path, 'compare.csv')]
  full = calibration.costs['GMACs'].options
  assert costs[0] == pytest.approx(full[0]) and costs[-1] <= full[-1]
  assert (tmp_path / 'compare.svg').exists()
  file = str(tmp_path / 'image.png')
  Image.fromarray(pictures(1)[0]).save(file)
  capsys.readouterr()
  with flagsaver.flagsaver(workdir=run_with_exits, exit=2, format='json'):
    predict.run([file, file])
  answers = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
  assert [x['option'] for x in answers] == ['exit 2', 'exit 2']
  assert answers[0]['gmacs'] == pytest.approx(full[1])


def test_thresholds_are_never_set_on_the_test_images(run_with_exits, tmp_path):
  config = workdir.read_config(run_with_exits)
  config.data.validation_split = 'val'
  path = str(tmp_path / 'anytime')
  shutil.copytree(run_with_exits, path)
  settings.write_json(os.path.join(path, 'config.json'), settings.plain(config))
  with pytest.raises(UserError, match='tested on. Train with'):
    calibrate_lib.calibrate(Subject(path))
  os.remove(os.path.join(path, calibration_lib.FILE))
  with pytest.raises(UserError, match='not calibrated'):
    models_bench.subject(path, policy='best', settings=2, images=8)


def test_both_methods_on_one_plot(trained, classifier):
  images = list(pictures(24, seed=9))
  labels = np.arange(48) % 5
  sizes = tiny_trained(resolutions=(16, 32), image_px=16)
  drnet = Classifier.of(sizes, runtime='jax', batch=8)
  compared = []
  for name, one, model in (
    ('exits', classifier, trained),
    ('sizes', drnet, sizes),
  ):
    said = recorded(model, pictures(48))
    points = search.frontiers(search.tried(said, said.costs), said.costs)[
      'best'
    ][:3]
    policies = [point.policy for point in points]
    found = [scores.score(p, said, name) for p in policies]
    assert [s.gmacs for s in found] == pytest.approx([p.gmacs for p in points])
    # Images of the same labels, whatever was said of them.
    said = dataclasses.replace(said, label=labels)
    compared.append(models_bench.Subject(name, one, policies, said, images))
  rows = models_bench.measure(compared, rounds=1, singly=False)
  assert {row['model'] for row in rows} == {'exits', 'sizes'}
  assert min(row['ms_per_image'] for row in rows) > 0
  assert rows[0]['timed_gmacs'] == pytest.approx(trained.model.macs().gmacs[0])
  fewer = dataclasses.replace(said, label=labels[1:])
  with pytest.raises(UserError, match='different images'):
    models_bench.measure(
      [compared[0], dataclasses.replace(compared[1], record=fewer)],
      rounds=1,
      singly=False,
    )


@pytest.mark.parametrize(
  'change, message',
  [
    ({'exits.step': 'pretrain'}, 'exits.objective.distill is missing'),
    ({'data.held_out': 48}, 'leaves none to learn from'),
    ({'data.held_out': 0}, 'or none aside'),
    ({'model.method': 'msdnet'}, 'is not one of'),
  ],
)
def test_mistakes_in_a_config(run_with_exits, tmp_path, change, message):
  config = workdir.read_config(run_with_exits)
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    train.train(config, str(tmp_path))


def test_images_without_a_class_need_a_teacher(run_with_exits, tmp_path):
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  config = workdir.read_config(run_with_exits)
  config.data.unlabelled = str(tmp_path)
  with pytest.raises(UserError, match="'exits' learns from labels: config.ex"):
    train.train(config, str(tmp_path / 'run'))


def test_benchmark_compares_with_the_last_exit(trained):
  contract = Contract.of(trained)
  subject = subjects.Subject(trained, list(pictures(40)))
  contenders = inference.Contenders(subject, ['jax'], [8])
  stages = inference.time_networks(contenders, rounds=1)
  names = contract.options.names
  assert [row['part'] for row in stages] == 2 * list(names)
  total = sum(row['gmacs'] for row in stages if row['batch'] == 8)
  assert total == pytest.approx(contract.gmacs[-1])
  for row in inference.time_predictions(contenders, rounds=1):
    share = float(row['policy'].partition('%')[0]) / 100
    # Of 40 images one more or less counts, and batches round differently.
    assert row['gmacs'] <= 1.05 * share * contract.gmacs[-1] or (
      row['mode'] == 'single'
    )
    assert row['implied'] == pytest.approx(contract.gmacs[-1] / row['gmacs'])
    assert row['realised_of_implied'] == pytest.approx(
      row['realised'] / row['implied']
    )
