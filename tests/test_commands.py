# SPDX-License-Identifier: Apache-2.0
"""The commands that use a trained run, on one that took no training."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import encoded, pictures, rows_of, tiny_trained

from drnet_jax import __main__, main, mesh, settings
from drnet_jax.bench import inference, subjects
from drnet_jax.choosing import calibration as calibration_lib
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing import scores
from drnet_jax.choosing.options import Costs
from drnet_jax.commands import (
  benchmark_stream,
  calibrate,
  compare,
  export,
  predict,
  report,
)
from drnet_jax.errors import UserError
from drnet_jax.report import evaluated
from drnet_jax.run import calibrate as calibrate_lib
from drnet_jax.run import evaluate, workdir
from drnet_jax.run.checkpoint import Checkpoints
from drnet_jax.run.recording import Subject
from drnet_jax.serve import choice
from drnet_jax.serve.classifier import Classifier

# Splits of so many images, where the weights mean nothing anyway.
SMALL = {'validation_split': 'validation[:400]', 'test_split': 'test[:400]'}


def copy_of(run, path, **data):
  """A workdir whose config names other data."""
  shutil.copytree(run, path)
  config = workdir.read_config(path)
  config.data.update(data)
  settings.write_json(os.path.join(path, 'config.json'), settings.plain(config))
  return str(path)


@pytest.fixture(scope='module')
def calibrated(run, tmp_path_factory):
  """Of the whole splits, also in milliseconds."""
  path = copy_of(run, str(tmp_path_factory.mktemp('calibrated') / 'run'))
  with flagsaver.flagsaver(workdir=path, measure='onnx'):
    calibrate.run([])
  return path


@pytest.fixture(scope='module')
def small(run, tmp_path_factory):
  """Evaluated on splits of a few images, and so calibrated."""
  path = copy_of(run, str(tmp_path_factory.mktemp('small') / 'run'), **SMALL)
  evaluate.evaluate(path)
  return path


def test_calibrate_leaves_policies_a_record_and_a_table(calibrated):
  calibration = calibration_lib.read(calibrated)
  assert calibration.images == 4000
  assert calibration.split == 'scaled_digits/validation'
  families = {'fixed', 'router', 'cascade', 'routed_cascade', 'best'}
  for unit in ('GMACs', 'ms'):
    assert set(calibration.points[unit]) == families
    for points in calibration.points[unit].values():
      for low, high in zip(points, points[1:], strict=False):
        assert low.cost < high.cost and low.top1 < high.top1
  ms = calibration.costs['ms']
  assert 0 < min(ms.options) and 'onnx, batch 1' in ms.source
  record = calibration_lib.read_record(calibrated)
  assert record.predicted.shape == (4000, 7)  # sizes, and means of them
  assert record.origin.endswith('; scaled_digits/validation')
  rows = rows_of(calibrated, 'report', 'budgets.csv')
  assert {row['family'] for row in rows} == families
  for row in rows:
    promised, got = float(row['promised_gmacs']), float(row['test_gmacs'])
    assert got == pytest.approx(promised, rel=0.05)
  assert os.path.exists(os.path.join(calibrated, 'report', 'index.html'))
  # The same weights again: nothing is run, and the milliseconds are kept.
  again = calibrate_lib.calibrate(Subject(calibrated)).calibration
  assert again.costs['ms'] == ms and again.points == calibration.points


def test_records_of_other_images_are_made_again(small):
  """Whatever of `config.data` says which images, and how they are read."""
  record = calibration_lib.read_record(small)
  split = record.origin.rpartition('/')[2]
  same = Subject(small, ['--config.data.threads=3'])
  assert same.is_current(record, split)
  for change in ('resize_px=40', 'keep_aspect=False', 'data_dir=elsewhere'):
    other = Subject(small, [f'--config.data.{change}'])
    assert not other.is_current(record, split), change


def test_batches_that_the_devices_cannot_share_are_named(small):
  for size in (0, 7):
    with pytest.raises(UserError, match=f'eval_batch_size = {size} cannot be'):
      Subject(small, [f'--config.eval_batch_size={size}'])


def test_what_is_timed_is_of_all_classes():
  examples = [{'label': i // 100} for i in range(1000)]
  found = [x['label'] for x in subjects.spread(examples, 40)]
  assert np.bincount(found).tolist() == [4] * 10
  assert subjects.spread(examples, 2000) == examples


@pytest.mark.parametrize(
  'flags, why',
  [
    ({'halves': 2, 'split': 'test'}, '--split cannot be .* --halves'),
    ({'halves': 2, 'measure': 'jax', 'batch': 8}, '--measure and --batch'),
    ({'batch': 8}, '--batch cannot be combined with options that are not'),
    ({'precision': 'f32'}, '--precision cannot be combined with options that'),
    ({'to': 'elsewhere'}, '--to cannot be combined with one --workdir'),
    ({'compare': ['other']}, '--compare .* a network without exits'),
  ],
)
def test_flags_of_calibrate_that_do_not_go_together(small, flags, why):
  with (
    flagsaver.flagsaver(workdir=small, **flags),
    pytest.raises(UserError, match=why),
  ):
    calibrate.run([])


@pytest.mark.parametrize(
  'flags, why',
  [
    ({'mode': 'describe', 'measure': 'auto'}, '--measure .* --mode=describe'),
    ({'batch': 8}, '--batch cannot be combined with options that are not'),
  ],
)
def test_flags_of_main_that_do_not_go_together(flags, why):
  with flagsaver.flagsaver(**flags), pytest.raises(UserError, match=why):
    main._run(())


def test_one_checkpoint_is_no_run_to_calibrate(small):
  step = workdir.load(small, mesh.create(1)).origin.rpartition(' ')[2]
  path = os.path.join(small, 'checkpoints', 'finetune', step)
  with pytest.raises(UserError, match='is one checkpoint'):
    Subject(path)


def test_policies_are_never_set_on_the_test_images(small, tmp_path):
  path = copy_of(small, str(tmp_path / 'run'))
  os.remove(os.path.join(path, calibration_lib.FILE))
  for split, message in (
    ('test[:400]', 'tested on. Train with'),
    # Some of its images under another name.
    ('test[380:780]', "5% of the images of 'test.380:780.' are also in the"),
  ):
    with flagsaver.flagsaver(workdir=path, split=split):
      with pytest.raises(UserError, match=message):
        calibrate.run([])
  assert calibration_lib.read(path) is None
  # `main` goes on without, and says so.
  config = workdir.read_config(path)
  config.data.validation_split = config.data.test_split
  settings.write_json(os.path.join(path, 'config.json'), settings.plain(config))
  evaluate.evaluate(path)
  assert evaluated.read(path).calibration is None
  with pytest.raises(UserError, match='not calibrated'):
    compare_by(path, str(tmp_path / 'both'))


def test_what_is_of_other_weights_is_made_again(small, tmp_path):
  path = copy_of(small, str(tmp_path / 'run'))
  before = calibration_lib.read(path)
  test = os.path.join(path, workdir.TEST_RECORD)
  old = record_lib.load(test)
  trained = tiny_trained(
    num_classes=10, resolutions=(16, 32, 64), predictor_px=16, spread=0.5
  )
  with Checkpoints(path, 'finetune', keep=1) as checkpoints:
    checkpoints.save_weights(8, trained.params, trained.batch_stats)
  # What the old weights did says nothing of these.
  assert Classifier.load(path, runtime='jax', batch=1).calibration is None
  done = calibrate_lib.calibrate(Subject(path))
  done.write()
  found = done.calibration
  record = record_lib.load(test)
  assert 'step 8' in found.origin and 'step 8' in record.origin
  assert found.origin != before.origin
  assert (record.confidence != old.confidence).any()
  assert Classifier.load(path, runtime='jax', batch=1).calibration == found


def test_milliseconds_need_to_be_measured(small, calibrated):
  classifier = Classifier.load(small, runtime='jax', batch=1)
  with pytest.raises(UserError, match='no milliseconds were measured'):
    classifier.set_budget(ms=1.0)
  classifier = Classifier.load(calibrated, runtime='jax', batch=1)
  points = classifier.calibration.points['ms']['best']
  assert classifier.set_budget(ms=points[-1].cost) == points[-1]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp('images')
  for i, image in enumerate(pictures(6, side=70)):
    (folder / f'{i}.png').write_bytes(encoded(image))
  return folder


def predicted(path, images, capsys, **flags):
  with flagsaver.flagsaver(workdir=path, **flags):
    predict.run([str(images)])
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
  assert [row['option'] for row in rows] == [x.option for x in expected]
  assert [row['ran'] for row in rows] == ['; '.join(x.ran) for x in expected]
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
  # Of the same weights, so the calibration holds.
  assert classifier.set_budget(gmacs=7e-5).gmacs <= 7e-5
  with pytest.raises(
    UserError, match=r'no checkpoint finetune/8; there are \[7\]'
  ):
    Classifier.load(path[:-1] + '8', runtime='jax')


def test_predict_keeps_to_a_budget_and_a_policy(calibrated, images, capsys):
  calibration = calibration_lib.read(calibrated)

  def rows(**flags):
    text = predicted(
      calibrated, images, capsys, format='json', runtime='onnx', **flags
    )
    return [json.loads(line) for line in text.splitlines()]

  classifier = Classifier.load(calibrated, runtime='onnx')
  paths = [str(images / f'{i}.png') for i in range(6)]
  for asked in (
    {'gmacs': 7e-5},
    {'policy': 'cascade', 'gmacs': 1e-4},
    {'policy': 'routed_cascade'},
    {'accuracy': calibration.points['GMACs']['best'][0].top1},
  ):
    classifier.policy = calibration.find(**asked).policy
    expected = [x.gmacs for x in classifier.predict(paths)]
    flags = {k if k == 'policy' else f'budget_{k}': v for k, v in asked.items()}
    assert [row['gmacs'] for row in rows(**flags)] == pytest.approx(expected)
  classifier.policy = classifier.contract.as_trained
  expected = [x.option for x in classifier.predict(paths)]
  assert [row['option'] for row in rows(policy='router')] == expected
  for wrong, message in (
    ({'budget_gmacs': 1e-9}, 'out of reach'),
    ({'budget_accuracy': 1.1}, 'is no share'),
    ({'budget_gmacs': 7e-5, 'budget_ms': 1.0}, 'one budget'),
    ({'budget_gmacs': 7e-5, 'size': 16}, 'cannot be combined with a policy or'),
    ({'policy': 'cascade', 'size': 16}, 'cannot be combined with a policy or'),
    ({'size': 16, 'exit': 1}, 'nor with each other'),
    ({'size': 17}, "'17 px' is not one of 16 px, 32 px, 64 px"),
    ({'exit': 1}, "'exit 1' is not one of 16 px"),
  ):
    with pytest.raises(UserError, match=message):
      predicted(calibrated, images, capsys, runtime='onnx', **wrong)


def test_export_checks_itself_and_is_predicted_from(
  calibrated, images, capsys, tmp_path
):
  folder = str(tmp_path / 'exported')
  with flagsaver.flagsaver(workdir=calibrated, to=folder, check_images=40):
    export.run([])
  text = capsys.readouterr().out
  for runtime in ('onnx', 'stablehlo'):
    for policy in ('as it will run', '16 px', '32 px', '64 px'):
      assert f'{runtime}, {policy}: 40 images' in text
  assert text.count('options differ on 0') == 8
  ours = predicted(calibrated, images, capsys, format='json', runtime='onnx')
  theirs = predicted(folder, images, capsys, format='json')
  for a, b in zip(ours.splitlines(), theirs.splitlines(), strict=True):
    a, b = json.loads(a), json.loads(b)
    assert a['ran'] == b['ran'] and a['label'] == b['label']
  exported = Classifier.load(folder, runtime='onnx')
  assert exported.calibration == calibration_lib.read(calibrated)
  assert exported.set_budget(gmacs=7e-5).gmacs <= 7e-5


def exported_to_int8(path, folder, capsys, **flags):
  with flagsaver.flagsaver(
    workdir=path, to=folder, int8=True, formats=['onnx'], **flags
  ):
    export.run(['--config.data.validation_split=validation[:200]'])
  return capsys.readouterr().out


def test_int8_says_what_it_loses_and_keeps_what_loses_too_much(
  small, images, capsys, tmp_path, monkeypatch
):
  if not choice.is_installed('nncf'):
    pytest.skip('NNCF is not installed')
  folder = str(tmp_path / 'exported')
  flags = {'check_images': 0}
  with pytest.raises(UserError, match='at every option: .* stays in float32'):
    exported_to_int8(small, folder, capsys, max_drop=-50.0, **flags)
  with monkeypatch.context() as patch:
    patch.setattr(choice, 'is_installed', lambda module: module != 'nncf')
    with pytest.raises(UserError, match='needs NNCF'):  # before any work
      exported_to_int8(small, f'{folder}_not', capsys, **flags)
  assert not os.path.exists(f'{folder}_not')
  assert 'int8' not in settings.read_json(f'{folder}/contract.json')

  text = exported_to_int8(small, folder, capsys, max_drop=50.0, **flags)
  parts = settings.read_json(f'{folder}/contract.json')['int8']
  names = ['16 px', '32 px', '64 px', 'predictor', 'as it will run']
  assert [part['name'] for part in parts] == names
  assert all(part['is_int8'] and part['images'] == 100 for part in parts)
  card = pathlib.Path(folder, 'README.md').read_text()
  for part in parts:
    line = next(x for x in text.splitlines() if x.startswith(part['name']))
    assert f'{part["changed"]} of 100' in line
    assert f'{100 * part["float32"]:.1f} | {100 * part["int8"]:.1f}' in card
    # Of random weights next to nothing is right, but int8 is the same network.
    assert part['changed'] < 0.3 * part['images']
  assert any(part['changed'] for part in parts)
  assert not os.path.exists(f'{folder}/weights.bin')

  # What loses more than the least of the sizes stays as it was.
  mixed = str(tmp_path / 'mixed')
  drops = [100 * (x['float32'] - x['int8']) for x in parts[:3]]
  least = min(drops)
  size = (16, 32, 64)[drops.index(least)]  # whose loss is that of the whole
  exported_to_int8(small, mixed, capsys, max_drop=least, size=size, **flags)
  kept = settings.read_json(f'{mixed}/contract.json')['int8']
  for part, name in zip(kept[:3], ('r16', 'r32', 'r64'), strict=True):
    assert part['is_int8'] == (100 * (part['float32'] - part['int8']) <= least)
    graph = pathlib.Path(mixed, f'{name}.onnx').read_bytes()
    assert part['is_int8'] == (b'QuantizeLinear' in graph)
  assert os.path.exists(f'{mixed}/weights.bin') == (
    not all(part['is_int8'] for part in kept)
  )

  # It runs as it was measured, in both runtimes and in run.py.
  held_out = subjects.of_workdir(small, 40, {}).files
  reference = Classifier.load(small, runtime='jax')
  reference.set_option('64 px')
  expected = [x.probabilities for x in reference.predict(held_out)]
  for runtime in ('openvino', 'onnx'):
    ours = Classifier.load(folder, runtime=runtime)
    assert f'{runtime} in int8' in ours.runtime
    ours.set_option('64 px')
    found = [x.probabilities for x in ours.predict(held_out)]
    # Quantised it is not the same; without VNNI it is further off.
    assert 1e-6 < np.abs(np.subtract(found, expected)).mean() < 0.05
  with pytest.raises(UserError, match='was exported to int8: precision'):
    Classifier.load(folder, runtime='openvino', precision='f32')
  predicted(folder, images, capsys, format='json')

  subject = subjects.of_workdir(small, 6, {})
  contenders = inference.Contenders(subject, ['openvino'], [4], int8=folder)
  worth = inference.time_predictions(contenders, 1)
  modes = [r['mode'] for r in worth if r['path'] == 'openvino in int8']
  assert {*modes} == {'single', 'bulk', 'bulk, files'}
  with pytest.raises(UserError, match='--int8 needs openvino among --paths'):
    inference.Contenders(subject, ['onnx'], [1], int8=folder)


def test_benchmark_adds_up(run, tmp_path):
  subject = subjects.of_workdir(run, 12, {})
  contenders = inference.Contenders(subject, ['jax', 'onnx'], [1, 4])
  speed = inference.time_networks(contenders, 1)
  assert len(speed) == 2 * 2 * 4  # paths, batches, predictor and sizes
  for row in speed:
    assert row['images_per_second'] == pytest.approx(1e3 / row['ms_per_image'])
  worth = inference.time_predictions(contenders, 1)
  assert len(worth) == 2 * 3  # paths, modes; not calibrated: one policy
  gmacs = subject.contract.gmacs
  sizes = [
    x.size_px
    for x in Classifier.load(run, runtime='onnx').predict(subject.files)
  ]
  mean = np.mean([gmacs[subject.contract.sizes_px.index(r)] for r in sizes])
  for row in worth:
    assert row['policy'] == 'router as trained'
    assert row['gmacs'] == pytest.approx(
      mean + subject.contract.predictor_gmacs
    )
    assert row['implied'] == pytest.approx(gmacs[-1] / row['gmacs'])
    assert row['realised_of_implied'] == pytest.approx(
      row['realised'] / row['implied']
    )
  parts = inference.time_parts(contenders, 1)
  for path in ('jax', 'onnx'):
    assert sum(r['share'] for r in parts if r['path'] == path) == (
      pytest.approx(1)
    )
  full, scaled = inference.time_decoding(contenders, 1)
  # These files are PNGs as large as the crop: nothing can be left out.
  assert (full['decode'], scaled['decode']) == ('full', 'scaled')
  assert full['same_label'] == full['same_options'] == 1.0
  assert 0 <= scaled['top1'] <= 1 and full['ms_per_image'] > 0
  inference.draw(contenders, speed, str(tmp_path / 'latency'))
  assert (tmp_path / 'latency.svg').exists()
  text = inference.verdict(worth)
  assert text.count('router as trained: it ') == 6 and 'Fastest, bulk' in text


def test_openvino_is_timed_beside_itself(run):
  # Not pytest.importorskip, which would import it with its telemetry.
  if not choice.is_installed('openvino'):
    pytest.skip('OpenVINO is not installed')
  subject = subjects.of_workdir(run, 6, {})
  contenders = inference.Contenders(subject, ['openvino'], [1, 4])
  speed = inference.time_networks(contenders, 1)
  sizes = 3
  assert [row['path'] for row in speed].count('openvino, plain') == 2 * sizes
  worth = inference.time_predictions(contenders, 1)
  plain = [row for row in worth if row['path'] == 'openvino, plain']
  assert [row['mode'] for row in plain] == ['single', 'bulk']
  assert all(row['implied'] == 1 and row['realised'] > 0 for row in plain)
  # What is timed computes: the same network on the same crop.
  crops = np.zeros((1, 64, 64, 3), np.uint8)
  engine = contenders.classifiers['openvino'].engine
  np.testing.assert_allclose(
    contenders.plain['openvino, plain'].in_bulk(2, 1)(list(crops))[0],
    np.asarray(engine.run(2, crops)[0]),
    atol=1e-6,
  )
  assert 'times as long' in inference.verdict(worth)
  parts = inference.time_parts(contenders, 1)
  for path in contenders.classifiers:  # one in each precision
    share = sum(row['share'] for row in parts if row['path'] == path)
    assert share == pytest.approx(1)


def test_a_benchmark_of_a_calibrated_run_times_its_policies(small):
  best = evaluated.read(small).found.policy
  subject = subjects.of_workdir(small, 2, {})
  router = subject.contract.as_trained
  assert subject.policies == {'best': best, 'router as trained': router}
  subject = subjects.of_workdir(small, 2, {'policy': 'cascade'})
  (policy,) = subject.policies.values()
  assert policy.family == 'cascade' and set(subject.policies) == {'cascade'}
  subject = subjects.of_workdir(small, 2, {'policy': 'router'})
  assert subject.policies == {'router as trained': router}


def test_a_benchmark_of_a_stream_counts_every_image(small):
  with flagsaver.flagsaver(
    workdir=small, images=20, rounds=2, loads=['0.5', '2']
  ):
    benchmark_stream.run([])
  with open(f'{small}/report/stream.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  of_each = ['the full option', 'best', 'router as trained']
  assert [row['policy'] for row in rows] == 2 * of_each
  at_half, at_twice = rows[:3], rows[3:]
  for a, b in zip(at_half, at_twice, strict=True):
    rates = [float(row['images_per_second']) for row in (a, b)]
    assert rates[1] == pytest.approx(4 * rates[0])
    for row in (a, b):
      for share in ('late', 'hurried'):  # of 2 x 20 images
        count = 40 * float(row[share])
        assert 0 <= count <= 40 and count == pytest.approx(round(count))
      assert 0 < float(row['ms_p50']) <= float(row['ms_p99'])
  # In full nothing can hurry, so nothing is wrong that is right at leisure.
  full = Classifier.load(small)
  full.set_option('64 px')
  subject = subjects.of_workdir(small, 20, {})
  labels = [x.label for x in full.predict(subject.files)]
  for row in rows[::3]:
    assert float(row['hurried']) == 0
    assert float(row['top1']) == np.mean(np.equal(labels, subject.labels))
  with flagsaver.flagsaver(workdir=small, loads=['0']):
    with pytest.raises(UserError, match='--loads must be above 0'):
      benchmark_stream.run([])


def test_drawn_sizes_keep_their_shares():
  start = subjects.Drawn((0.2, 0.5, 0.3))
  log_p = np.zeros((100, 3))
  first = start(log_p, None)
  np.testing.assert_allclose(
    np.bincount(first) / 100, (0.2, 0.5, 0.3), atol=0.011
  )
  start.restart()
  np.testing.assert_array_equal(
    np.concatenate([start(log_p[:30], None), start(log_p[30:], None)]), first
  )


def test_a_benchmark_of_random_weights_needs_no_run():
  subject = subjects.of_network('resnet10', (16, 32), (0.5, 0.5), 3)
  assert subject.contract.sizes_px == (16, 32)
  assert jax.tree.leaves(subject.trained.params)
  with pytest.raises(UserError, match='add up to 1'):
    subjects.of_network('resnet10', (16, 32), (0.5, 0.6), 3)


def compare_by(paths, folder, **flags):
  with flagsaver.flagsaver(
    workdirs=[paths] if isinstance(paths, str) else paths,
    folder=folder,
    settings=3,
    timed_images=4,
    timed_rounds=1,
    **flags,
  ):
    compare.run([])
  return rows_of(folder, 'compare.csv')


# A ladder: networks of two runs, one behind the other.


@pytest.fixture(scope='module')
def ladder(run, small, tmp_path_factory):
  """The folder of a ladder of two runs that know the same classes."""
  folder = tmp_path_factory.mktemp('ladder')
  other = copy_of(run, str(folder / 'larger'), **SMALL)
  trained = tiny_trained(
    num_classes=10, resolutions=(16, 32, 64), predictor_px=16, spread=0.5
  )
  with Checkpoints(other, 'finetune', keep=1) as checkpoints:
    checkpoints.save_weights(8, trained.params, trained.batch_stats)
  with flagsaver.flagsaver(workdir=f'{small},{other}', to=str(folder / 'both')):
    calibrate.run([])
  return str(folder / 'both')


def test_a_ladder_is_calibrated(ladder):
  calibration = calibration_lib.read(ladder)
  assert calibration.options.names == tuple(
    f'{run}: {px} px' for run in ('run', 'larger') for px in (16, 32, 64)
  )
  run = evaluated.read(ladder)
  assert run.calibration == calibration and len(run.record.label) == 400
  assert run.network == 'ladder of run and larger' and run.sizes == '6 options'
  # The predictor of the first knows the sizes of the first.
  assert (
    np.isfinite(run.record.log_p).all(0).tolist() == 3 * [True] + [False] * 3
  )
  rows = rows_of(ladder, 'report', 'budgets.csv')
  assert any('run: ' in r['policy'] and 'larger: ' in r['policy'] for r in rows)
  with flagsaver.flagsaver(workdir='a,b'):
    with pytest.raises(UserError, match='--to is missing'):
      calibrate.run([])


def test_a_ladder_takes_over_no_run(ladder, small, calibrated):
  before = calibration_lib.read(calibrated)
  both = f'{small},{calibrated}'
  with flagsaver.flagsaver(workdir=both, to=calibrated):
    with pytest.raises(UserError, match='holds a run: name a new folder'):
      calibrate.run([])
  assert calibration_lib.read(calibrated) == before
  assert not os.path.exists(os.path.join(calibrated, 'ladder.json'))


def test_a_ladder_is_calibrated_again_by_its_folder(ladder):
  before = calibration_lib.read(ladder)
  with flagsaver.flagsaver(workdir=ladder):
    calibrate.run([])
  assert calibration_lib.read(ladder) == before


def test_a_damaged_calibration_is_replaced(small, tmp_path):
  path = copy_of(small, str(tmp_path / 'run'))
  file = os.path.join(path, calibration_lib.FILE)
  with open(file, 'w') as damaged:
    damaged.write('{"format": 2}')
  with pytest.raises(UserError, match='another version.*: calibrate, or'):
    calibration_lib.read(path)
  with flagsaver.flagsaver(workdir=path, measure='onnx'):
    calibrate.run([])
  assert 'ms' in calibration_lib.read(path).points


def test_an_evaluation_may_be_measured(small, tmp_path, capsys):
  """What is followed is then cheapest in time; without, nothing is lost."""
  path = copy_of(small, str(tmp_path / 'run'))

  def refuse(trained):
    raise UserError('there is no such runtime')

  evaluate.evaluate(path, measure=refuse)
  assert 'Not measured: there is no such runtime' in capsys.readouterr().out
  assert {*calibration_lib.read(path).costs} == {'GMACs'}

  def measure(trained):  # on a machine that small sizes do not help
    count = len(trained.model.options)
    options = tuple(4 - 0.01 * (count - 1 - j) for j in range(count))
    return Costs('ms', options, 0.1, 'made up')

  evaluate.evaluate(path, measure=measure)
  found = calibration_lib.read(path)
  assert found.costs['ms'].source == 'made up'
  assert found.find().policy.family == 'fixed'
  said = capsys.readouterr().out
  assert 'And on the stopwatch? 1.0' in said and '(made up)' in said


def test_options_are_timed_as_is_asked(small, tmp_path):
  if not choice.is_installed('openvino'):
    pytest.skip('OpenVINO is not installed')
  path = copy_of(small, str(tmp_path / 'run'))
  how = {'measure': 'openvino', 'precision': 'f32', 'batch': 2}
  with flagsaver.flagsaver(workdir=path, **how):
    calibrate.run([])
  costs = calibration_lib.read(path).costs['ms']
  assert costs.source == 'openvino, batch 2, cpu'


def test_a_ladder_is_predicted_by_its_best_policy(
  ladder, small, images, capsys
):
  run = evaluated.read(ladder)
  policy = run.calibration.find(policy='cascade').policy
  classifier = Classifier.load(ladder, runtime='onnx')
  classifier.policy = policy
  paths = [str(images / f'{i}.png') for i in range(6)]
  expected = [x.ran for x in classifier.predict(paths)]
  how = {'format': 'json', 'runtime': 'onnx'}
  text = predicted(ladder, images, capsys, policy='cascade', **how)
  found = [json.loads(line)['ran'] for line in text.splitlines()]
  assert found == ['; '.join(ran) for ran in expected]
  # Without the folder there is no calibration: the first router, as trained.
  with open(os.path.join(ladder, 'ladder.json')) as file:
    members = [
      os.path.join(ladder, path) for path in json.load(file)['members']
    ]
  text = predicted(','.join(members), images, capsys, **how)
  classifier.policy = classifier.contract.as_trained
  expected = [x.option for x in classifier.predict(paths)]
  assert [json.loads(x)['option'] for x in text.splitlines()] == expected
  assert all(option.startswith('run: ') for option in expected)


def test_a_ladder_is_reported_compared_and_exported(
  ladder, small, images, tmp_path, capsys
):
  with flagsaver.flagsaver(workdir=ladder, report_to=str(tmp_path / 'page')):
    report.run([])
  text = (tmp_path / 'page' / 'report.md').read_text()
  assert 'ladder of run and larger at 6 options' in text
  rows = compare_by([small, ladder], str(tmp_path / 'compared'))
  for path in (small, ladder):
    timed = [row for row in rows if row['model'] == path]
    assert len(timed) in (3, 4)  # three, and the most expensive option
    full = max(timed, key=lambda row: float(row['timed_gmacs']))
    assert (float(full['implied']), float(full['realised'])) == (1, 1)
  points = calibration_lib.read(ladder).points['GMACs']['best']
  got = scores.score(points[-1].policy, evaluated.read(ladder).record, '')
  best = [r for r in rows if r['model'] == ladder][2]
  assert float(best['top1']) == pytest.approx(got.top1)
  folder = str(tmp_path / 'exported')
  capsys.readouterr()
  with flagsaver.flagsaver(
    workdir=ladder, to=folder, check_images=20, formats=['onnx']
  ):
    export.run([])
  assert capsys.readouterr().out.count('options differ on 0') == 7
  ours = predicted(ladder, images, capsys, format='json', runtime='onnx')
  theirs = predicted(folder, images, capsys, format='json', runtime='onnx')
  for a, b in zip(ours.splitlines(), theirs.splitlines(), strict=True):
    a, b = json.loads(a), json.loads(b)
    assert a['ran'] == b['ran'] and a['label'] == b['label']


# What versions before left.


@pytest.fixture
def of_version_4(small, tmp_path):
  """A workdir as version 0.4 left it, calibrated."""
  path = copy_of(small, str(tmp_path / 'run'))
  record = record_lib.load(os.path.join(path, workdir.TEST_RECORD))
  count = len(record.options)
  np.savez_compressed(
    os.path.join(path, workdir.TEST_RECORD),
    options=np.array(record.options.names),
    gmacs=record.gmacs,
    predictor_gmacs=record.costs.predictor,
    label=record.label,
    predicted=record.predicted[:, :count],
    confidence=record.confidence[:, :count],
    top5=record.top5[:, :count],
    log_p=record.log_p,
    **{f'extra.{k}': v for k, v in record.extra.items()},
  )
  os.remove(os.path.join(path, calibration_lib.RECORD))
  settings.write_json(
    os.path.join(path, calibration_lib.FILE),
    {'split': 'scaled_digits/validation', 'log_p': [[0.0, 0.0, 0.0]]},
  )
  return path


def test_a_workdir_of_version_4_is_reported(of_version_4, small, tmp_path):
  with flagsaver.flagsaver(workdir=of_version_4, report_to=str(tmp_path)):
    report.run([])
  rows = {r['policy']: r for r in rows_of(str(tmp_path), 'evaluation.csv')}
  assert {'fixed 16 px', 'router', 'best fixed', 'random', 'oracle'} <= set(
    rows
  )
  expected = evaluated.read(small).router_judgement.policy
  assert float(rows['router']['top1']) == pytest.approx(expected.top1.value)
  assert float(rows['router']['gmacs']) == pytest.approx(expected.gmacs.value)


def test_a_workdir_of_version_4_is_predicted_with_and_calibrated(
  of_version_4, images, capsys
):
  classifier = Classifier.load(of_version_4, runtime='jax', batch=1)
  assert classifier.calibration is None
  assert classifier.policy == classifier.contract.as_trained
  rows = predicted(of_version_4, images, capsys, format='json').splitlines()
  assert len(rows) == 6
  with flagsaver.flagsaver(workdir=of_version_4, measure='jax'):
    calibrate.run([])
  assert Classifier.load(
    of_version_4, runtime='jax', batch=1
  ).calibration.costs['ms']


# What the command line is like.


def command(*arguments, code=None):
  run = ['-c', code] if code else ['-m', 'drnet_jax', *arguments]
  return subprocess.run(
    [sys.executable, *run], capture_output=True, text=True, timeout=120
  )


def test_without_a_verb_the_verbs_are_listed():
  done = command()
  assert done.returncode == 0 and not done.stderr
  for verb, what in __main__.VERBS.items():
    assert any(
      line.split(maxsplit=1) == [verb, what]
      for line in done.stdout.splitlines()
    )
  folder = os.path.dirname(calibrate.__file__)
  files = {name.removesuffix('.py') for name in os.listdir(folder)}
  assert files - {'__init__', '__pycache__', 'cli', 'flags'} == set(
    __main__.VERBS
  )


def test_an_unknown_verb_is_an_error():
  done = command('pedict', '--workdir=x')
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith("error: 'pedict' is not a verb")


HEAVY = (
  'jax',
  'flax',
  'grain',
  'tensorflow_datasets',
  'matplotlib',
  'orbax',
  'sklearn',
  'scipy',
)
HELP = f"""
import json, os, sys
from drnet_jax import __main__
for verb in __main__.VERBS:
  if not os.fork():
    sys.argv = ['drnet_jax', verb, '--help']
    __main__.main()
    heavy = [name for name in {HEAVY} if name in sys.modules]
    print('imported:', verb, *heavy)
    sys.stdout.flush()
    os._exit(0)
  os.wait()
import drnet_jax.main
print('imported: main', *[name for name in {HEAVY} if name in sys.modules])
"""


def test_help_comes_at_once():
  done = command(code=HELP)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  for verb in (*__main__.VERBS, 'main'):
    assert f'imported: {verb}' in lines
  assert len([line for line in lines if line == 'Flags:']) == len(
    __main__.VERBS
  )
