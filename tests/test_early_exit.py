# SPDX-License-Identifier: Apache-2.0
"""Real early exit does what a simulated one says."""

import csv
import dataclasses
import io
import json
import os
import shutil

import jax
import ml_collections
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import compilations, tiny_trained
from PIL import Image

from configs import cifar10_ranet_tiny
from drnet_jax import models, settings
from drnet_jax.bench import exits as benchmark_exits
from drnet_jax.commands import calibrate, compare, predict
from drnet_jax.errors import UserError
from drnet_jax.report import exits
from drnet_jax.report.policies import Record
from drnet_jax.run import evaluate, train, workdir
from drnet_jax.serve import budget, exit_budget
from drnet_jax.serve.answers import Failure
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.early_exit import EarlyExitClassifier
from drnet_jax.serve.exit_budget import ExitCalibration

NETWORK = {
  'stem': 'cifar',
  'width': 4,
  'growth': 4,
  'levels': (1, 2),
  'factors': (2, 1),
  'layers': 1,
}


@pytest.fixture(scope='module')
def trained():
  """A network whose exits disagree, as if it had been trained."""
  model = models.create_ranet(
    network=NETWORK,
    image_px=16,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    num_classes=5,
  )
  params, batch_stats = model.init(jax.random.key(0))
  network = params['network']
  for k in range(1, len(model.options) + 1):
    head = network[f'exit{k}']['head']
    head['kernel'] = head['kernel'] * 6
  return workdir.Trained(
    model=model,
    params=params,
    batch_stats=batch_stats,
    has_router=False,
    class_names=tuple('abcde'),
    config=cifar10_ranet_tiny.get_config(),
    origin='a test',
  )


@pytest.fixture(scope='module')
def classifier(trained):
  return Classifier.of(trained, batch=8)


def pictures(count, seed=0):
  rng = np.random.default_rng(seed)
  low = rng.integers(0, 200, (count, 1, 1, 3))
  noise = rng.integers(0, 56, (count, 16, 16, 3))
  return (low + noise).astype(np.uint8)


def simulated(trained, images):
  """Probabilities of every exit, [B, E, K]."""
  logits = jax.jit(trained.model.all_logits)(
    trained.params, trained.batch_stats, images
  )
  return np.asarray(jax.nn.softmax(logits))


def record(trained, images):
  p = simulated(trained, images)
  return Record(
    options=np.array(trained.model.options),
    gmacs=np.array(trained.model.macs().gmacs),
    predictor_gmacs=0.0,
    label=p[:, -1].argmax(-1),
    predicted=p.argmax(-1),
    confidence=p.max(-1),
    top5=np.ones(p.shape[:2], bool),
    log_p=None,
    extra={},
  )


# First, while the classifier is fresh.
def test_nothing_is_compiled_after_loading(classifier):
  classifier.set_thresholds([0.5, 0.5, 0.5, 0.5])
  with compilations() as compiled:
    for count in (1, 2, 7, 40):
      classifier.predict(pictures(count))
  assert not compiled


@pytest.mark.parametrize('ratio', [0.2, 0.7, 1.5])
def test_real_is_simulated(classifier, trained, ratio):
  images = pictures(150)
  p = simulated(trained, images)
  limits = exits.thresholds(
    p.max(-1), exits.geometric_shares(ratio, p.shape[1])
  )
  # Midway between two images, so that no rounding decides.
  limits = np.where(np.isfinite(limits), limits - 1e-5, limits)
  left_at = exits.leave_at(p.max(-1), limits)
  assert len(set(left_at.tolist())) == 4, 'the test should use every exit'
  classifier.set_thresholds(limits)
  answers = classifier.predict(iter(images))
  assert [x.exit_number - 1 for x in answers] == left_at.tolist()
  np.testing.assert_allclose(
    [x.probabilities for x in answers], p[np.arange(150), left_at], atol=1e-5
  )
  gmacs = np.array(trained.model.macs().gmacs)
  np.testing.assert_allclose([x.gmacs for x in answers], gmacs[left_at])
  for image, together in zip(images[:12], answers, strict=False):
    (alone,) = classifier.predict([image])
    assert alone.exit_number == together.exit_number
    np.testing.assert_allclose(
      alone.probabilities, together.probabilities, atol=1e-6
    )


def test_an_exit_for_all(classifier, trained):
  images = pictures(11, seed=1)
  p = simulated(trained, images)
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
  assert ran == 5 * [0, 1]  # batches of 8


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


def test_the_dial_meets_a_budget(classifier, trained, tmp_path):
  with pytest.raises(UserError, match='not calibrated'):
    classifier.set_budget(gmacs=1.0)
  calibration = ExitCalibration.of(
    record(trained, pictures(600)), split='a test'
  )
  calibration.write(str(tmp_path))
  classifier.calibration = exit_budget.read(str(tmp_path))
  costs = trained.model.macs().gmacs
  images = pictures(600, seed=5)
  try:
    for share in (0.2, 0.5, 0.8):
      asked = costs[0] + share * (costs[-1] - costs[0])
      point = classifier.set_budget(gmacs=asked)
      assert point == calibration.find(gmacs=asked)
      assert 0.97 * asked <= point.gmacs <= asked
      answers = classifier.predict(images)
      spent = np.mean([x.gmacs for x in answers])
      assert spent == pytest.approx(asked, rel=0.06)
    assert classifier.set_budget(gmacs=costs[0]).shares[0] == 1
    assert classifier.set_budget(gmacs=costs[-1]).cost <= costs[-1]
    cheap = classifier.set_budget(accuracy=0.6)
    assert cheap.top1 >= 0.6 and cheap.cost < costs[-1]
    with pytest.raises(UserError, match='out of reach'):
      classifier.set_budget(gmacs=2 * costs[-1])
    with pytest.raises(UserError, match='no milliseconds'):
      classifier.set_budget(ms=1)
  finally:
    classifier.calibration = None
  (tmp_path / budget.FILE).write_text('{')
  with pytest.raises(UserError, match='calibrate again'):
    exit_budget.read(str(tmp_path))


def test_what_networks_with_exits_cannot(trained, classifier):
  with pytest.raises(UserError, match="'jax' only"):
    Classifier.of(trained, runtime='onnx')
  with pytest.raises(UserError, match='no streams'):
    classifier.stream(deadline_ms=10)
  with pytest.raises(UserError, match='not a threshold'):
    classifier.set_thresholds([0.5])


# The commands, on a run that took no training.


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A workdir of a tiny network on a packed file of noise."""
  folder = tmp_path_factory.mktemp('ranet')
  files = []
  for image in pictures(96, seed=7):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    files.append(file.getvalue())
  np.savez(
    folder / 'noise.npz',
    data=np.frombuffer(b''.join(files), np.uint8),
    offsets=np.cumsum([0, *map(len, files)]),
    label=np.arange(96) % 5,
    split=np.repeat([0, 1], 48),
    class_name=np.array([b'a', b'b', b'c', b'd', b'e']),
  )
  config = cifar10_ranet_tiny.get_config()
  with config.unlocked():
    config.model.network = NETWORK | {'first_blocks': 1, 'more_blocks': 1}
  config.model.image_px = 16
  config.data.update(
    name='packed',
    data_dir=str(folder / 'noise.npz'),
    test_split='val',
    held_out=16,
    epoch_images=32,
  )
  config.eval_batch_size = 16
  config.exits.update(epochs=2, batch_size=16, eval_every_epochs=1)
  path = str(folder / 'run')
  train.train(config, path)
  return path


def test_a_run_trains_evaluates_calibrates_and_predicts(run, capsys, tmp_path):
  evaluate.evaluate(run)
  with open(os.path.join(run, 'held_out.json')) as file:
    assert len(set(json.load(file))) == 16
  with open(os.path.join(run, 'metrics.csv')) as file:
    names = {row['metric'] for row in csv.DictReader(file)}
  assert {'train/top1_exit2', 'validation/fixed_exit_2_top1'} <= names
  with flagsaver.flagsaver(workdir=run, measure='jax'):
    calibrate._run()
  with open(os.path.join(run, 'report', 'budget.csv')) as file:
    rows = list(csv.DictReader(file))
  assert [float(row['q']) for row in rows] == list(exits.RATIOS)
  calibration = exit_budget.read(run)
  assert calibration.confidence.shape == (16, 2)
  assert list(calibration.ms.sizes) == sorted(calibration.ms.sizes)
  with flagsaver.flagsaver(
    workdirs=[run],
    folder=str(tmp_path),
    settings=2,
    timed_images=8,
    timed_rounds=1,
  ):
    compare._run()
  with open(tmp_path / 'compare.csv') as opened:
    costs = [float(row['timed_gmacs']) for row in csv.DictReader(opened)]
  assert costs == pytest.approx(calibration.gmacs.sizes)
  assert (tmp_path / 'compare.svg').exists()
  file = str(tmp_path / 'image.png')
  Image.fromarray(pictures(1)[0]).save(file)
  capsys.readouterr()
  with flagsaver.flagsaver(workdir=run, exit=2, format='json'):
    predict._run([file, file])
  answers = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
  assert [x['exit'] for x in answers] == [2, 2]
  assert answers[0]['gmacs'] == pytest.approx(calibration.gmacs.sizes[1])


def test_thresholds_are_never_set_on_the_test_images(run, tmp_path):
  config = workdir.read_config(run)
  config.data.validation_split = 'val'
  path = str(tmp_path / 'anytime')
  shutil.copytree(run, path)
  settings.write_json(os.path.join(path, 'config.json'), settings.plain(config))
  with pytest.raises(UserError, match='tested on. Train with'):
    calibrate.calibrate(path)
  os.remove(os.path.join(path, budget.FILE))
  with pytest.raises(UserError, match='not calibrated'):
    compare.subject(path, points=2, images=8)


def test_both_methods_on_one_plot(trained, classifier):
  images = list(pictures(24, seed=9))
  labels = np.arange(48) % 5
  seen = record(trained, pictures(48))
  sizes = tiny_trained(resolutions=(16, 32))
  drnet = Classifier.of(sizes, batch=8)
  log_p = np.log(np.random.default_rng(0).dirichlet((1, 1), 48))
  gmacs = drnet.contract.gmacs
  both = dataclasses.replace(
    seen, gmacs=np.array(gmacs), log_p=log_p, predicted=seen.predicted[:, :2]
  )
  both = dataclasses.replace(
    both, top5=both.top5[:, :2], predictor_gmacs=drnet.contract.predictor_gmacs
  )
  subjects = []
  for name, one, kept, calibration in (
    ('exits', classifier, seen, ExitCalibration.of(seen, split='a test')),
    ('sizes', drnet, both, budget.Calibration.of(both, split='a test')),
  ):
    points = calibration.points(calibration.gmacs, 3)
    scores = [calibration.score(point, kept) for point in points]
    subjects.append(compare.Subject(name, one, points, scores, labels, images))
    assert [s.gmacs for s in scores] == pytest.approx([p.gmacs for p in points])
    assert [s.top1 for s in scores] == pytest.approx([p.top1 for p in points])
  rows = compare.measure(subjects, rounds=1, singly=False)
  assert [row['model'] for row in rows] == 3 * ['exits'] + 3 * ['sizes']
  assert min(row['ms_per_image'] for row in rows) > 0
  first, *_, last = [row['timed_gmacs'] for row in rows[:3]]
  assert first == pytest.approx(trained.model.macs().gmacs[0])
  assert first < last <= trained.model.macs().gmacs[-1]
  with pytest.raises(UserError, match='different images'):
    compare.measure(
      [subjects[0], dataclasses.replace(subjects[1], labels=labels[1:])],
      rounds=1,
      singly=False,
    )


@pytest.mark.parametrize(
  'change, message',
  [
    ({'exits.step': 'pretrain'}, 'trains a DRNet, config.model makes a RANet'),
    ({'data.held_out': 48}, 'leaves none to learn from'),
    ({'data.held_out': 0}, 'or none aside'),
    ({'model.method': 'msdnet'}, 'is not one of'),
  ],
)
def test_mistakes_in_a_config(run, tmp_path, change, message):
  config = workdir.read_config(run)
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    train.train(config, str(tmp_path))


def test_benchmark_compares_with_the_last_exit(trained, classifier):
  contract = benchmark_exits._contract(
    dataclasses.replace(trained, config=ml_collections.ConfigDict())
  )
  classifier = EarlyExitClassifier(contract, classifier.engine)
  images = list(pictures(40))
  classifier.calibration = benchmark_exits._calibration(classifier, images)
  stages = benchmark_exits.time_stages(classifier, rounds=1)
  assert [row['stage to exit'] for row in stages] == 2 * [1, 2, 3, 4]
  total = sum(row['mmacs'] for row in stages if row['batch'] == 8)
  assert total == pytest.approx(1e3 * contract.gmacs[-1])
  for row in benchmark_exits.time_predictions(classifier, images, rounds=1):
    share = row['share of the full cost']
    # Of 40 images one more or less counts, and batches round differently.
    assert row['gmacs'] <= 1.05 * share * contract.gmacs[-1]
    assert row['implied'] == pytest.approx(contract.gmacs[-1] / row['gmacs'])
    assert row['realised'] == pytest.approx(
      row['full_ms'] / row['early_exit_ms']
    )
