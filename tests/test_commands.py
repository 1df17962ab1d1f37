# SPDX-License-Identifier: Apache-2.0
"""The commands that use a trained run, on one that took no training."""

import csv
import json
import os

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from test_classifier import encoded, pictures

from drnet_jax.bench import inference as benchmark
from drnet_jax.commands import calibrate, export, predict
from drnet_jax.errors import UserError
from drnet_jax.serve import budget
from drnet_jax.serve.classifier import Classifier


@pytest.fixture(scope='module')
def calibrated(run):
  with flagsaver.flagsaver(workdir=run, measure='onnx', points=6):
    calibrate._run()
  return run


def test_calibrate_leaves_a_dial_a_table_and_a_figure(calibrated):
  calibration = budget.read(calibrated)
  assert calibration.log_p.shape == (2000, 3)
  assert calibration.split == 'scaled_digits/validation'
  assert (
    0 < min(calibration.ms.sizes) and 'onnx, batch 1' in calibration.ms.source
  )
  with open(os.path.join(calibrated, 'report', 'budget.csv')) as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 6
  for row in rows:
    asked, got = float(row['asked_gmacs']), float(row['test_gmacs'])
    assert got == pytest.approx(asked, rel=0.03)
  for ending in ('png', 'svg'):
    assert os.path.exists(
      os.path.join(calibrated, 'report', f'budget.{ending}')
    )


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp('images')
  for i, image in enumerate(pictures(6, side=70)):
    (folder / f'{i}.png').write_bytes(encoded(image))
  return folder


def predicted(path, images, capsys, **flags):
  with flagsaver.flagsaver(workdir=path, **flags):
    predict._run([str(images)])
  return capsys.readouterr().out


def test_predict_prints_what_was_asked_for(calibrated, images, capsys):
  rows = [
    json.loads(line)
    for line in predicted(
      calibrated, images, capsys, format='json', top_k=3
    ).splitlines()
  ]
  assert [os.path.basename(r['image']) for r in rows] == [
    f'{i}.png' for i in range(6)
  ]
  assert all(len(row['top']) == 3 for row in rows)
  expected = Classifier.load(calibrated, runtime='onnx').predict(
    [row['image'] for row in rows]
  )
  assert [row['size_px'] for row in rows] == [x.size_px for x in expected]
  table = predicted(
    calibrated, images, capsys, runtime='onnx', size=16, top_k=2
  )
  assert table.count('16 px') == 6 and 'class 2' in table
  text = predicted(
    calibrated, images, capsys, format='csv', runtime='onnx', top_k=2
  )
  found = list(csv.DictReader(text.splitlines()))
  assert [int(row['size_px']) for row in found] == [x.size_px for x in expected]
  assert float(found[0]['probability']) == pytest.approx(
    expected[0].probability, abs=1e-4
  )
  assert {'class_2', 'probability_2'} <= set(found[0])


def test_one_checkpoint_is_loaded_by_its_path(calibrated):
  path = os.path.join(calibrated, 'checkpoints', 'finetune', '7')
  classifier = Classifier.load(path, runtime='onnx')
  assert classifier.contract.origin == 'stage finetune, step 7'
  assert classifier.set_budget(gmacs=7e-5).gmacs == pytest.approx(7e-5)
  with pytest.raises(
    UserError, match=r'no checkpoint finetune/8; there are \[7\]'
  ):
    Classifier.load(path[:-1] + '8')


def test_predict_keeps_to_a_budget(calibrated, images, capsys):
  point = budget.read(calibrated).find(gmacs=7e-5)
  assert point.gmacs == pytest.approx(7e-5)
  text = predicted(
    calibrated, images, capsys, budget_gmacs=7e-5, format='json', runtime='onnx'
  )
  assert len(text.splitlines()) == 6
  for wrong, message in (
    ({'budget_gmacs': 100.0}, 'out of reach'),
    ({'budget_gmacs': 7e-5, 'budget_ms': 1.0}, 'one budget'),
    ({'budget_gmacs': 7e-5, 'size': 16}, 'nothing to choose'),
    ({'size': 17}, '17 px is not one of'),
  ):
    with pytest.raises(UserError, match=message):
      predicted(calibrated, images, capsys, runtime='onnx', **wrong)


def test_export_checks_itself_and_is_predicted_from(
  calibrated, images, capsys, tmp_path
):
  folder = str(tmp_path / 'exported')
  with flagsaver.flagsaver(workdir=calibrated, to=folder, check_images=40):
    export._run()
  text = capsys.readouterr().out
  for runtime in ('onnx', 'stablehlo'):
    for sizes in ('as chosen', '16 px', '32 px', '64 px'):
      assert f'{runtime}, {sizes}: 40 images' in text
  assert 'sizes differ on 0' in text
  ours = predicted(calibrated, images, capsys, format='json', runtime='onnx')
  theirs = predicted(folder, images, capsys, format='json')
  for a, b in zip(ours.splitlines(), theirs.splitlines(), strict=True):
    a, b = json.loads(a), json.loads(b)
    assert a['size_px'] == b['size_px'] and a['label'] == b['label']
  exported = Classifier.load(folder, runtime='onnx')
  assert exported.set_budget(gmacs=7e-5).gmacs == pytest.approx(7e-5)


def test_benchmark_adds_up(run, tmp_path):
  subject = benchmark.of_workdir(run, 12)
  contenders = benchmark.Contenders(subject, ['jax', 'onnx'], [1, 4])
  speed = benchmark.time_networks(contenders, 1)
  assert len(speed) == 2 * 2 * 4  # paths, batches, predictor and sizes
  for row in speed:
    assert row['images_per_second'] == pytest.approx(1e3 / row['ms_per_image'])
  worth = benchmark.time_predictions(contenders, 1)
  gmacs = subject.contract.gmacs
  sizes = [
    x.size_px
    for x in Classifier.load(run, runtime='onnx').predict(subject.files)
  ]
  mean = np.mean([gmacs[subject.contract.resolutions.index(r)] for r in sizes])
  for row in worth:
    assert row['gmacs'] == pytest.approx(
      mean + subject.contract.predictor_gmacs
    )
    assert row['implied'] == pytest.approx(gmacs[-1] / row['gmacs'])
    assert row['realised_of_implied'] == pytest.approx(
      row['realised'] / row['implied']
    )
  parts = benchmark.time_parts(contenders, 1)
  for path in ('jax', 'onnx'):
    assert sum(r['share'] for r in parts if r['path'] == path) == (
      pytest.approx(1)
    )
  full, scaled = benchmark.time_decoding(subject, 1)
  # These files are PNGs as large as the crop: nothing can be left out.
  assert (full['decode'], scaled['decode']) == ('full', 'scaled')
  assert full['same_label'] == full['same_size'] == 1.0
  assert 0 <= scaled['top1'] <= 1 and full['ms_per_image'] > 0
  benchmark.draw(subject, speed, str(tmp_path / 'latency'))
  assert (tmp_path / 'latency.svg').exists()
  text = benchmark.verdict(worth, speed)
  assert text.count('routing') == 6 and 'Fastest path, bulk' in text


def test_drawn_sizes_keep_their_shares():
  policy = benchmark.Drawn((0.2, 0.5, 0.3))
  views = [None] * 100
  first = policy(None, views)
  np.testing.assert_allclose(
    np.bincount(first) / 100, (0.2, 0.5, 0.3), atol=0.011
  )
  policy.restart()
  np.testing.assert_array_equal(
    np.concatenate([policy(None, views[:30]), policy(None, views[30:])]), first
  )


def test_a_benchmark_of_random_weights_needs_no_run():
  subject = benchmark.of_network('resnet10', (16, 32), (0.5, 0.5), 3)
  assert subject.contract.resolutions == (16, 32)
  assert jax.tree.leaves(subject.trained.params)
  with pytest.raises(UserError, match='add up to 1'):
    benchmark.of_network('resnet10', (16, 32), (0.5, 0.6), 3)
