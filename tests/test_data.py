# SPDX-License-Identifier: Apache-2.0
"""scaled_digits and the pipeline, on the real builder."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from test_sources import DATA

from drnet_jax import settings
from drnet_jax.data import scaled_digits, shards, sources
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError


@pytest.fixture(scope='module')
def data(data_dir):
  return Data(
    **DATA
    | {
      'name': 'scaled_digits',
      'data_dir': data_dir,
      'train_split': 'originals',
      'validation_split': 'validation',
      'test_split': 'test',
      'augmentation': 'compose_digits',
    }
  )


def batches(data, count, **changes):
  arguments = {'size_px': 64, 'batch_size': 8, 'seed': 3, 'start_step': 0}
  source = data.open('originals')
  stream = data.train_batches(source, **arguments | changes)
  return list(itertools.islice(stream, count))


def assert_same(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    assert all((a[k] == b[k]).all() for k in a)


def test_splits_have_the_promised_sizes_and_digits(data):
  originals, test = data.open('originals'), data.open('test')
  assert (len(originals.examples), len(test.examples)) == (1258, 4000)
  assert len(data.open('validation').examples) == 4000
  assert originals.class_names == tuple('0123456789')
  sizes = np.array([test.examples[i]['digit_px'] for i in range(400)])
  assert sizes.min() >= 9 and sizes.max() <= 56
  # log-uniform: the median is the geometric mean of 9 and 56
  assert abs(np.median(sizes) - np.sqrt(9 * 56)) < 4


def test_a_small_split_is_read_once_and_a_large_one_each_time(
  data, monkeypatch
):
  read = []

  def counted(self, i, whole=shards.Shards._read):
    read.append(i)
    return whole(self, i)

  monkeypatch.setattr(shards.Shards, '_read', counted)
  small = data.open('originals').examples
  monkeypatch.setattr(shards, '_KEPT_BYTES', 0)
  large = data.open('originals').examples
  for examples, times in ((small, 1), (large, 3)):
    read.clear()
    changed = examples[5]
    changed.pop('image')  # what is kept is nobody's to change
    assert examples[5] == examples[5]
    assert read == [5] * times
  assert small[5] == large[5] and small[5].keys() > changed.keys()


def test_originals_are_scikit_learns_and_not_in_the_test_split(data):
  from sklearn import datasets  # takes seconds, of every worker

  digits = datasets.load_digits()
  known = {
    np.round(image * (255 / 16)).astype(np.uint8).tobytes(): label
    for image, label in zip(digits.images, digits.target, strict=True)
  }
  source = data.open('originals')
  for i in range(0, 1258, 50):
    example = source.examples[i]
    image = np.asarray(Image.open(io.BytesIO(example['image'])))[..., 0]
    assert known[image.tobytes()] == example['label']
    assert digits.target[example['original']] == example['label']
  test = data.open('test').examples
  assert len({int(test[i]['original']) for i in range(4000)}) == 359
  # 1258 + 180 + 359 originals make the whole 1797, each in one split.
  assert len(digits.target) - 1258 == 180 + 359


def test_fresh_in_every_epoch_and_the_same_in_every_run(data):
  first = batches(data, 3)
  assert_same(first, batches(data, 3))
  epoch = 1258 // 8 + 1
  seen = {x.tobytes() for b in batches(data, epoch) for x in b['image']}
  later = batches(data, 2, start_step=epoch)
  assert not any(x.tobytes() in seen for b in later for x in b['image'])
  digit = np.full((8, 8), 255, np.uint8)
  one, two = (
    scaled_digits.compose(digit, np.random.default_rng(s))[0] for s in (0, 1)
  )
  assert (one != two).any()


def test_position_is_the_step_number(data):
  assert_same(batches(data, 6)[4:], batches(data, 2, start_step=4))


def test_processes_share_the_global_batch(data):
  whole = batches(data, 2)
  parts = [batches(data, 2, process=p, num_processes=2) for p in range(2)]
  for step in range(2):
    merged = np.concatenate([part[step]['image'] for part in parts])
    assert (merged == whole[step]['image']).all()


def test_evaluation_sees_each_image_once_and_pads_the_last_batch(data):
  source = data.open('validation')
  seen = list(data.eval_batches(source, size_px=64, batch_size=768))
  assert [len(b['label']) for b in seen] == [768] * 6
  assert [int(b['valid'].sum()) for b in seen] == [768] * 5 + [160]
  labels = np.concatenate([b['label'][b['valid']] for b in seen])
  assert labels.tolist() == [
    source.examples[i]['label'] for i in range(len(source.examples))
  ]


def test_unknown_names(data, data_dir):
  with pytest.raises(UserError, match='no_such_set'):
    sources.load('no_such_set', 'train', data_dir=data_dir)
  with pytest.raises(UserError, match="split 'training'"):
    sources.load('scaled_digits', 'training', data_dir=data_dir)
  with pytest.raises(UserError, match='augmentation'):
    settings.call(Data, {**vars(data), 'augmentation': 'flip'}, 'config.data')
