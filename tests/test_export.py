# SPDX-License-Identifier: Apache-2.0
"""An exported folder: it agrees with JAX, stands alone, and says what it is."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_trained
from PIL import Image
from test_classifier import encoded, pictures, smooth_jpeg

from drnet_jax.commands import export
from drnet_jax.errors import UserError
from drnet_jax.export import package
from drnet_jax.export.contract import Contract
from drnet_jax.export.standalone import Model
from drnet_jax.serve import budget
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.picture import Picture

RUNTIME = pathlib.Path(package.__file__).with_name('onnx_runtime.py')


@pytest.fixture(scope='module')
def trained():
  return tiny_trained()


@pytest.fixture(scope='module')
def ours(trained):
  return Classifier.of(trained, batch=4)


@pytest.fixture(scope='module')
def calibration(ours):
  images = pictures(200, seed=7)
  contract = ours.contract
  return budget.Calibration(
    np.concatenate(
      [ours.engine.log_p(images[i : i + 4]) for i in range(0, 200, 4)]
    ),
    np.ones((200, 3), bool),
    budget.Costs('GMACs', contract.gmacs, contract.predictor_gmacs, ''),
    None,
    'a test',
  )


@pytest.fixture(scope='module')
def folder(trained, calibration, tmp_path_factory):
  path = str(tmp_path_factory.mktemp('exported'))
  package.write(path, trained, Contract.of(trained), calibration)
  return path


def test_what_an_export_may_replace(trained, folder, tmp_path):
  contract = Contract.of(trained)
  taken, file = tmp_path / 'taken', tmp_path / 'file'
  taken.mkdir()
  (taken / 'thesis.txt').write_text('')
  file.write_text('')
  for path, message in (
    (taken, 'holds something else than an export'),
    (file, 'is a file'),
    (file / 'below', 'cannot write'),
  ):
    with pytest.raises(UserError, match=message):
      package.write(str(path), trained, contract, None, formats=('onnx',))
  with pytest.raises(UserError, match='no format'):
    package.write(str(tmp_path / 'none'), trained, contract, None, formats=())
  # An older export goes whole.
  target = tmp_path / 'export'
  shutil.copytree(folder, target)
  package.write(str(target), trained, contract, None, formats=('onnx',))
  names = os.listdir(target)
  assert budget.FILE not in names
  assert not any(name.endswith('.stablehlo') for name in names)
  with pytest.raises(UserError, match='exported to onnx only'):
    Classifier.load(str(target), runtime='stablehlo')


@pytest.mark.parametrize('runtime', ['onnx', 'stablehlo'])
def test_exported_paths_agree_with_jax(ours, folder, runtime):
  theirs = Classifier.load(folder, runtime=runtime, batch=4)
  assert theirs.contract == ours.contract
  images = list(pictures(100, seed=5))
  parity = export.compare(ours, theirs, images)
  assert parity.holds and parity.images == 100
  assert parity.largest < 1e-5


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
  ours = Classifier.of(trained)
  package.write(str(tmp_path), trained, ours.contract, None)
  with np.load(PHOTOGRAPHS) as file:
    data, offsets = file['data'], file['offsets']
  images = [data[offsets[i] : offsets[i + 1]].tobytes() for i in range(1000)]
  for runtime in ('onnx', 'stablehlo'):
    theirs = Classifier.load(str(tmp_path), runtime=runtime)
    parity = export.compare(ours, theirs, images)
    assert parity.holds and parity.ties < 10
  sizes = {x.size_px for x in ours.predict(images)}
  assert len(sizes) > 1, 'the test should use several sizes'


def test_parity_sees_other_weights(ours):
  other = Classifier.of(tiny_trained(spread=3.0), runtime='onnx')
  assert not export.compare(ours, other, list(pictures(10))).holds


def test_shared_weights_are_stored_once(tmp_path):
  network = {'network': 'resnet', 'stage_sizes': (1,), 'width': 16}
  trained = tiny_trained(base=network | {'stem': 'cifar'})
  ours = Classifier.of(trained, batch=4)
  contract, sizes = Contract.of(trained), {}
  for weights in ('folded', 'shared'):
    path = tmp_path / weights
    package.write(str(path), trained, contract, None, weights=weights)
    sizes[weights] = (path / 'weights.bin').stat().st_size
  # One copy of the base instead of three; the predictor is small.
  assert sizes['shared'] < 0.5 * sizes['folded']
  kernel = trained.params['base']['stage1_block1']['conv1']['kernel']
  for program in path.glob('*.stablehlo'):
    assert np.asarray(kernel).tobytes() not in program.read_bytes()
  for runtime in ('onnx', 'stablehlo'):
    theirs = Classifier.load(str(path), runtime=runtime, batch=4)
    assert export.compare(ours, theirs, list(pictures(50))).holds


def test_the_runtime_is_short_and_needs_no_jax(ours, folder, tmp_path):
  assert len(RUNTIME.read_text().splitlines()) < 100
  images = pictures(6, seed=6)
  paths = []
  for i, image in enumerate(images):
    path = tmp_path / f'{i}.png'
    path.write_bytes(encoded(image))
    paths.append(str(path))
  program = (
    'import runpy, sys\n'
    f'sys.argv = ["run.py", *{paths!r}]\n'
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
    assert row['size_px'] == expected.size_px
    assert row['gmacs'] == pytest.approx(expected.gmacs)
    assert row['probability'] == pytest.approx(expected.probability, abs=1e-5)


def test_the_runtime_keeps_to_a_budget(folder, calibration):
  table = json.loads(pathlib.Path(folder, 'contract.json').read_text())[
    'budgets'
  ]
  costs = [row['gmacs'] for row in table]
  assert costs == sorted(set(costs)) and len(costs) > 8
  images = [Image.fromarray(x) for x in pictures(200, seed=7)]
  for row in (table[1], table[-2]):
    model = Model(folder, gmacs=row['gmacs'] * 1.0001)
    cost = np.mean([model.predict(image)['gmacs'] for image in images])
    assert cost == pytest.approx(row['gmacs'], rel=0.02)
  with pytest.raises(ValueError, match='no entry'):
    Model(folder, gmacs=costs[0] / 2)


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
  for keep_aspect in (True, False):
    model.contract |= {
      'decode': decode,
      'resize_px': 36,
      'keep_aspect': keep_aspect,
    }
    contract = Contract.from_json(model.contract)
    for side in (16, 24, 32) if decode == 'scaled' else (32,):
      np.testing.assert_array_equal(
        model.crop(str(path), side), Picture(str(path), contract).crop(side)
      )


def test_the_runtime_follows_a_scaled_contract(trained, tmp_path):
  package.write(
    str(tmp_path),
    trained,
    Contract.of(trained, decode='scaled'),
    None,
    formats=('onnx',),
  )
  model, classifier = (
    Model(str(tmp_path)),
    Classifier.load(str(tmp_path), runtime='onnx'),
  )
  for i, side in enumerate((40, 130, 260)):
    path = tmp_path / f'{i}.jpg'
    path.write_bytes(smooth_jpeg(side))
    (expected,) = classifier.predict([path])
    found = model.predict(str(path))
    assert found['size_px'] == expected.size_px
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
    'python run.py --gmacs',
    'mean 0.5, 0.5, 0.5',
    '## Limits',
  ):
    assert text in card


def test_an_exported_folder_is_run_as_exported(folder):
  with pytest.raises(UserError, match="runtime 'onnx'"):
    Classifier.load(folder)
  assert not json.loads(pathlib.Path(folder, 'contract.json').read_text())[
    'stablehlo_weights'
  ]


def test_without_a_predictor(tmp_path):
  trained = tiny_trained(has_router=False)
  package.write(
    str(tmp_path), trained, Contract.of(trained), None, formats=('onnx',)
  )
  assert not (tmp_path / 'predictor.onnx').exists()
  answer = Model(str(tmp_path)).predict(Image.fromarray(pictures(1)[0]))
  assert answer['size_px'] == 32
