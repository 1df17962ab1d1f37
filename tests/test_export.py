# SPDX-License-Identifier: Apache-2.0
"""An exported folder: it agrees with JAX, stands alone, and says what it is."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import recorded, tiny_trained
from PIL import Image
from test_classifier import encoded, pictures, smooth_jpeg

from drnet_jax.choosing import calibration as calibration_lib
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.errors import UserError
from drnet_jax.export import model_card, package
from drnet_jax.export.contract import Contract
from drnet_jax.export.standalone import Model, cut
from drnet_jax.serve import parity
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.picture import Picture

RUNTIME = pathlib.Path(package.__file__).with_name('standalone.py')


@pytest.fixture(scope='module')
def ours(trained):
  return Classifier.of(trained, runtime='jax', batch=4)


@pytest.fixture(scope='module')
def calibration(trained):
  images = pictures(400, seed=7)
  labels = np.random.default_rng(0).integers(0, 5, 400)
  said = recorded(trained, images)
  # Labels that each size names more often than the smaller ones.
  kept = np.random.default_rng(1).random((400, 3)) < [0.5, 0.7, 0.9]
  named = said.predicted[np.arange(400), kept.argmax(1)]
  labels = np.where(kept.any(1), named, labels)
  return Calibration.of(recorded(trained, images, labels), split='a test')


@pytest.fixture(scope='module')
def folder(ours, calibration, tmp_path_factory):
  path = str(tmp_path_factory.mktemp('exported'))
  calibrated = Classifier(ours.contract, ours.engine, calibration, ours.members)
  calibrated.policy = ours.contract.as_trained
  calibrated.export(path, formats=('onnx', 'stablehlo'))
  return path


def test_what_an_export_may_replace(ours, folder, tmp_path):
  taken, file = tmp_path / 'taken', tmp_path / 'file'
  taken.mkdir()
  (taken / 'thesis.txt').write_text('')
  file.write_text('')
  for path, message in (
    (taken, 'is not an export'),
    (file, 'is a file'),
    (file / 'below', 'cannot write'),
  ):
    with pytest.raises(UserError, match=message):
      ours.export(str(path), formats=('onnx',))
  with pytest.raises(UserError, match='no format'):
    ours.export(str(tmp_path / 'none'), formats=())
  # An older export goes whole.
  target = tmp_path / 'export'
  shutil.copytree(folder, target)
  ours.export(str(target), formats=('onnx',))
  names = os.listdir(target)
  assert calibration_lib.FILE not in names
  assert not any(name.endswith('.stablehlo') for name in names)
  with pytest.raises(UserError, match='exported to onnx only'):
    Classifier.load(str(target), runtime='stablehlo')


def test_what_cannot_be_replaced_stays(ours, folder, tmp_path, monkeypatch):
  """A mount point for one: it can be neither moved nor written over."""
  target = tmp_path / 'export'
  shutil.copytree(folder, target)
  before = sorted(os.listdir(target))
  replace = os.replace

  def refuse(source, to):
    if os.fspath(to) == str(target) and 'before' not in os.fspath(source):
      raise OSError(16, 'Device or resource busy', to)
    replace(source, to)

  monkeypatch.setattr(os, 'replace', refuse)
  with pytest.raises(UserError, match='cannot write .*busy'):
    ours.export(str(target), formats=('onnx',))
  assert sorted(os.listdir(target)) == before
  assert os.listdir(tmp_path) == ['export']


def test_trained_in_half_precision_is_exported_in_float32(tmp_path):
  half = tiny_trained(
    base={'network': 'resnet10', 'width': 8, 'dtype': 'bfloat16'},
    predictor={'network': 'resnet10', 'width': 8, 'dtype': 'bfloat16'},
  )
  ours = Classifier.of(half, runtime='jax', precision='f32', batch=4)
  ours.export(str(tmp_path), formats=('onnx', 'stablehlo'))
  images = list(pictures(20, seed=3))
  for runtime in ('onnx', 'stablehlo'):
    theirs = Classifier.load(str(tmp_path), runtime=runtime)
    assert parity.compare(ours, theirs, images).holds
  assert half.in_float32().digest == half.digest
  whole = tiny_trained()
  assert whole.in_float32().model is whole.model


@pytest.mark.parametrize('runtime', ['onnx', 'stablehlo'])
def test_exported_paths_agree_with_jax(ours, folder, runtime):
  theirs = Classifier.load(folder, runtime=runtime, precision='f32', batch=4)
  assert theirs.contract == ours.contract
  images = list(pictures(100, seed=5))
  theirs.policy = ours.policy
  found = parity.compare(ours, theirs, images)
  assert found.holds and found.images == 100
  assert found.largest < 1e-5


PHOTOGRAPHS = os.path.join(
  os.environ.get(
    'DRNET_JAX_DATA', pathlib.Path(__file__).parents[2] / 'shared' / 'data'
  ),
  'imagenet_val1300_227.npz',
)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.skipif(
  not os.path.exists(PHOTOGRAPHS), reason=f'{PHOTOGRAPHS} is not there'
)
def test_paths_agree_on_a_thousand_photographs(tmp_path):
  network = {'network': 'resnet10', 'width': 8}
  trained = tiny_trained(
    base=network, predictor=network, predictor_px=64, resolutions=(64, 96, 128)
  )
  ours = Classifier.of(trained, runtime='jax')
  ours.export(str(tmp_path), formats=('onnx', 'stablehlo'))
  with np.load(PHOTOGRAPHS) as file:
    data, offsets = file['data'], file['offsets']
  images = [data[offsets[i] : offsets[i + 1]].tobytes() for i in range(1000)]
  for runtime in ('onnx', 'stablehlo'):
    theirs = Classifier.load(str(tmp_path), runtime=runtime, precision='f32')
    found = parity.compare(ours, theirs, images)
    assert found.holds and found.ties < 10
  sizes = {x.size_px for x in ours.predict(images)}
  assert len(sizes) > 1, 'the test should use several sizes'


def test_parity_sees_other_weights(ours):
  other = Classifier.of(tiny_trained(spread=3.0), runtime='onnx')
  assert not parity.compare(ours, other, list(pictures(10))).holds


def test_shared_weights_are_stored_once(tmp_path):
  network = {'network': 'resnet', 'stage_sizes': (1,), 'width': 16}
  trained = tiny_trained(base=network | {'stem': 'cifar'})
  ours = Classifier.of(trained, runtime='jax', batch=4)
  sizes, formats = {}, ('onnx', 'stablehlo')
  for weights in ('folded', 'shared'):
    path = tmp_path / weights
    ours.export(str(path), formats=formats, weights=weights)
    sizes[weights] = (path / 'weights.bin').stat().st_size
  # One copy of the base instead of three; the predictor is small.
  assert sizes['shared'] < 0.5 * sizes['folded']
  kernel = trained.params['base']['stage1_block1']['conv1']['kernel']
  for program in path.glob('*.stablehlo'):
    assert np.asarray(kernel).tobytes() not in program.read_bytes()
  for runtime in formats:
    theirs = Classifier.load(
      str(path), runtime=runtime, precision='f32', batch=4
    )
    assert parity.compare(ours, theirs, list(pictures(50))).holds


def test_the_runtime_is_short_and_needs_no_jax(ours, folder, tmp_path):
  assert len(RUNTIME.read_text().splitlines()) < 112
  images = pictures(6, seed=6)
  paths = []
  for i, image in enumerate(images):
    path = tmp_path / f'{i}.png'
    path.write_bytes(encoded(image))
    paths.append(str(path))
  program = (
    'import runpy, sys\n'
    f'sys.argv = ["run.py", *{paths!r}]\n'
    f'sys.path.insert(0, {folder!r})\n'  # as `python run.py` does
    f'runpy.run_path({os.path.join(folder, "run.py")!r}, run_name="__main__")\n'
    'names = {name.partition(".")[0] for name in sys.modules}\n'
    'assert not names & {"jax", "flax", "drnet_jax"}, names\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, cwd='/'
  )
  assert done.returncode == 0, done.stderr
  found = [json.loads(line) for line in done.stdout.splitlines()]
  for row, path, expected in zip(
    found, paths, ours.predict(paths), strict=True
  ):
    assert row['image'] == path
    assert row['name'] == expected.name
    assert tuple(row['ran']) == expected.ran
    assert row['gmacs'] == pytest.approx(expected.gmacs)
    assert row['probability'] == pytest.approx(expected.probability, abs=1e-5)


def test_the_runtime_may_be_part_of_a_program(folder):
  parent, name = os.path.split(folder)
  program = (
    'import importlib, sys\n'
    'sys.modules["drnet_jax"] = None\n'
    f'run = importlib.import_module("{name}.run")\n'
    f'run.Model({folder!r})\n'
  )
  subprocess.run([sys.executable, '-c', program], cwd=parent, check=True)


@pytest.mark.parametrize('family', policy_lib.FAMILIES)
def test_the_runtime_follows_every_family(ours, folder, calibration, family):
  """Options, answers and costs are those of the same policy here."""
  images = [Image.fromarray(x) for x in pictures(80, seed=7)]
  points = calibration.points['GMACs'][family]
  for point in (points[0], points[len(points) // 2], points[-1]):
    model = Model(folder, policy=family, gmacs=point.gmacs)
    ours.policy = point.policy
    others = 0
    for image, expected in zip(images, ours.predict(images), strict=True):
      found = model.predict(image)
      if tuple(found['ran']) != expected.ran:
        others += 1
        continue
      assert found['gmacs'] == pytest.approx(expected.gmacs)
      np.testing.assert_allclose(
        found['probabilities'], expected.probabilities, atol=1e-5
      )
    assert others <= 1, 'an image may lie at a threshold to the last digit'
  ours.policy = ours.contract.as_trained
  with pytest.raises(ValueError, match=f"least of '{family}' is .* GMACs"):
    Model(folder, policy=family, gmacs=points[0].gmacs / 2)
  with pytest.raises(ValueError, match="no policy 'x'; there are best, casc"):
    Model(folder, policy='x', gmacs=9.0)


def test_a_ladder_is_exported_whole(trained, tmp_path):
  small = tiny_trained(has_router=False, resolutions=(16, 32), spread=2.0)
  ladder = Classifier.of_ladder(
    {'small': small, 'large': trained}, runtime='jax', batch=4
  )
  ladder.policy = policy_lib.Policy((0, 4), None, (0.3,), 'pooled')
  ladder.export(str(tmp_path / 'out'), formats=('onnx',))
  images = [Image.fromarray(x) for x in pictures(40, seed=2)]
  model = Model(str(tmp_path / 'out'))
  theirs = Classifier.load(str(tmp_path / 'out'), runtime='onnx')
  theirs.policy = ladder.policy
  for image, a, b in zip(
    images, ladder.predict(images), theirs.predict(images), strict=True
  ):
    found = model.predict(image)
    assert tuple(found['ran']) == a.ran == b.ran
    np.testing.assert_allclose(
      found['probabilities'], a.probabilities, atol=1e-5
    )


def modes():
  rng = np.random.default_rng(0)
  photo = rng.integers(0, 256, (50, 60, 3), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6
  palette = Image.fromarray(photo).quantize(8)
  files = {
    'rgb.png': encoded(photo),
    'grey.png': encoded(photo[..., 0]),
    'alpha.png': encoded(np.dstack([photo, photo[..., :1]])),
    'deep.png': encoded(photo[..., 0].astype(np.uint16) * 250),
    'jpeg.jpg': encoded(photo, 'JPEG'),
    'turned.jpg': encoded(photo, 'JPEG', exif=exif),
    'large.jpg': smooth_jpeg(300),
  }
  for name, image, options in (
    ('palette.png', palette, {'transparency': 3}),
    ('cmyk.jpg', Image.fromarray(photo).convert('CMYK'), {}),
  ):
    file = io.BytesIO()
    image.save(file, name[-3:].replace('jpg', 'jpeg'), **options)
    files[name] = file.getvalue()
  return files


@pytest.mark.parametrize('decode', ['full', 'scaled'])
@pytest.mark.parametrize('name', modes())
def test_the_runtime_crops_as_we_do(folder, trained, tmp_path, name, decode):
  path = tmp_path / name
  path.write_bytes(modes()[name])
  model = Model(folder)
  contract = Contract.of(trained, decode=decode)
  model.contract = json.loads(json.dumps(contract.to_json()))
  image = model.read(str(path))
  for plain in contract.views:
    for keep_aspect in (True, False):
      view = dataclasses.replace(
        plain, short_px=plain.side_px + 4, keep_aspect=keep_aspect
      )
      np.testing.assert_array_equal(
        cut(image, dataclasses.asdict(view)),
        Picture(str(path), contract).crop(view),
      )


def test_the_runtime_follows_a_scaled_contract(trained, tmp_path):
  ours = Classifier.of(trained, runtime='jax', batch=1, decode='scaled')
  ours.export(str(tmp_path), formats=('onnx',))
  model, classifier = (
    Model(str(tmp_path)),
    Classifier.load(str(tmp_path), runtime='onnx'),
  )
  for i, side in enumerate((40, 130, 260)):
    path = tmp_path / f'{i}.jpg'
    path.write_bytes(smooth_jpeg(side))
    (expected,) = classifier.predict([path])
    found = model.predict(str(path))
    assert tuple(found['ran']) == expected.ran
    np.testing.assert_allclose(
      found['probabilities'], expected.probabilities, atol=1e-6
    )
  with pytest.raises(UserError, match='exported for decode=scaled'):
    Classifier.load(str(tmp_path), runtime='onnx', decode='full')


def test_the_card_says_what_it_is(folder, trained):
  card = pathlib.Path(folder, 'README.md').read_text()
  for text in (
    '5 classes',
    '16 px, 24 px, 32 px',
    'scaled_digits/originals',
    'a test',
    'python run.py --policy=best --gmacs',
    'mean 0.5, 0.5, 0.5',
    '## Limits',
  ):
    assert text in card
  of = Contract.of(trained)
  converted = dataclasses.replace(of, origin='stage initial, step 0')
  about = model_card.about(trained, converted)
  assert 'with weights that were not trained further' in about
  assert 'trained on' in model_card.about(trained, of)
  table = model_card.int8_section([{'network': 'runs/a|b 64 px'}])
  assert r'| runs/a\|b 64 px |' in table


def test_an_exported_folder_is_run_as_exported(folder):
  with pytest.raises(UserError, match="runtime 'onnx'"):
    Classifier.load(folder, runtime='jax')
  assert not json.loads(pathlib.Path(folder, 'contract.json').read_text())[
    'stablehlo_weights'
  ]


def test_a_damaged_contract_is_one_error(folder, tmp_path):
  shutil.copytree(folder, tmp_path / 'of')
  file = tmp_path / 'of' / 'contract.json'
  fields = json.loads(file.read_text())
  no_usual = [row for row in fields['policies'] if row['family'] != 'usual']
  for damage in (
    {'policies': no_usual},
    {'policies': [{'family': 'usual'}]},
    {'options': {'names': []}},
    {'views': [{'px': 3}]},
  ):
    file.write_text(json.dumps(fields | damage))
    with pytest.raises(UserError, match='is damaged: export the run again'):
      Classifier.load(str(file.parent))


def test_an_export_does_what_it_was_exported_for(ours, tmp_path):
  """Here and in run.py, unless another policy is asked for."""
  usual = ours.policy
  try:
    for policy in (
      policy_lib.fixed(1),
      policy_lib.Policy((0, 2), None, (0.2,), 'pooled'),
      ours.contract.as_trained,
    ):
      ours.policy = policy
      ours.export(str(tmp_path), formats=('onnx',))
      theirs = Classifier.load(str(tmp_path), runtime='onnx')
      assert theirs.policy == policy
      text = (tmp_path / 'contract.json').read_text()
      assert 'Infinity' not in text  # which JSON has not
      images = [Image.fromarray(x) for x in pictures(20, seed=3)]
      model = Model(str(tmp_path))
      for image, a in zip(images, theirs.predict(images), strict=True):
        assert tuple(model.predict(image)['ran']) == a.ran
    ours.policy = dataclasses.replace(ours.policy, start=lambda log_p, draw: 0)
    with pytest.raises(UserError, match='a start of its own cannot be'):
      ours.export(str(tmp_path), formats=('onnx',))
  finally:
    ours.policy = usual


def test_run_py_without_a_budget_keeps_the_accuracy(folder, calibration):
  """As `Calibration.find`, whatever else of the family is in the contract."""
  for family, point in calibration.kept.items():
    policy = Model(folder, policy=family).policy
    assert policy['path'] == list(point.policy.path)
    assert policy['gmacs'] == point.gmacs
  assert calibration.kept['router'].policy == policy_lib.router(
    calibration.costs['GMACs'], calibration.kept['router'].policy.path
  )


def test_run_py_takes_the_best_policy_for_a_budget(ours, folder, calibration):
  best = calibration.points['GMACs']['best']
  assert Model(folder, gmacs=best[0].gmacs).policy['gmacs'] == best[0].gmacs
  assert Model(folder).policy['family'] == 'usual'
  done = subprocess.run(
    [sys.executable, os.path.join(folder, 'run.py'), '--gmacs=1e-9', 'x.jpg'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert "the least of 'best' is " in done.stderr


def test_without_a_predictor(tmp_path):
  trained = tiny_trained(has_router=False)
  Classifier.of(trained, runtime='jax', batch=1).export(
    str(tmp_path), formats=('onnx',)
  )
  assert not (tmp_path / 'predictor.onnx').exists()
  answer = Model(str(tmp_path)).predict(Image.fromarray(pictures(1)[0]))
  assert answer['ran'] == ['32 px']
