# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets whose features have other names, and labels without names."""

import io
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import encoded
from PIL import Image
from test_sources import DATA

from drnet_jax import settings
from drnet_jax.data import sources
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError


class OddFeatures(tfds.core.GeneratorBasedBuilder):
  """Eight images, two of each of four digits, and much that is no label."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features
    return tfds.core.DatasetInfo(
      builder=self,
      features=features.FeaturesDict(
        {
          'photo': features.Image(shape=(None, None, 3)),
          'mask': features.Image(shape=(None, None, 1)),
          'digit': features.Scalar(np.int64),
          'parity': features.ClassLabel(names=['even', 'odd']),
          'weight': features.Scalar(np.float32),
          'title': features.Text(),
          'boxes': features.Sequence(features.Scalar(np.int64)),
          'more': features.FeaturesDict({'digit': np.int64}),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(8),
      'test': self._generate_examples(2),
    }

  def _generate_examples(self, count):
    for i in range(count):
      digit = i % 4
      yield (
        i,
        {
          'photo': encoded(Image.new('RGB', (6, 6), (10 * digit,) * 3)),
          'mask': encoded(Image.new('L', (6, 6))),
          'digit': digit,
          'parity': digit % 2,
          'weight': digit / 4,
          'title': 'x' * i,
          'boxes': list(range(i)),
          'more': {'digit': 9},
        },
      )


@pytest.fixture(scope='module')
def odd_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp('odd'))


def load(odd_dir, keys, split='train', **changes):
  return sources.load(
    'odd_features', split, data_dir=odd_dir, keys=keys, **changes
  )


def seen(source):
  """(grey level / 10, label) of every example."""
  found = []
  for i in range(len(source.examples)):
    example = source.examples[i]
    with Image.open(io.BytesIO(example['image'])) as image:
      found.append((image.getpixel((0, 0))[0] // 10, int(example['label'])))
  return sorted(found)


def test_a_class_label_of_another_name(odd_dir):
  source = load(odd_dir, ('photo', 'parity'))
  assert source.class_names == ('even', 'odd')
  assert seen(source) == sorted([(d, d % 2) for d in range(4)] * 2)
  # Of the rest what is one number, as `digit_px` of scaled_digits.
  assert set(source.examples[0]) == {'image', 'label', 'digit', 'weight'}


def test_integers_without_names(odd_dir):
  """Their number is that of all splits: the test split has two of the four."""
  for split, digits in (('train', [0, 0, 1, 1, 2, 2, 3, 3]), ('test', [0, 1])):
    source = load(odd_dir, ('photo', 'digit'), split)
    assert source.class_names == ('0', '1', '2', '3')
    assert seen(source) == [(d, d) for d in digits]


def test_integers_named_by_a_list(odd_dir, tmp_path):
  path = tmp_path / 'names.txt'
  path.write_text('zero\none\ntwo\nthree\n')
  source = load(odd_dir, ('photo', 'digit'), classes=str(path))
  assert source.class_names == ('zero', 'one', 'two', 'three')
  path.write_text('zero\none\n')
  with pytest.raises(UserError, match='label . of .* is none of the 2 classes'):
    seen(load(odd_dir, ('photo', 'digit'), classes=str(path)))


@pytest.mark.parametrize(
  'keys, message',
  [
    (('image', 'label'), "'image' of .* is not an image; .* photo, mask would"),
    (('title', 'digit'), "'title' of .* is not an image"),
    (
      ('photo', 'label'),
      "'label' of .* is not a class or an integer; .* digit, parity would",
    ),
    (('photo', 'title'), "'title' of .* is not a class or an integer"),
    (('photo', 'boxes'), "'boxes' of .* is not a class or an integer"),
    (('photo', 'weight'), "'weight' of .* is not a class or an integer"),
    (('photo', 'more'), "'more' of .* is not a class or an integer"),
  ],
)
def test_what_is_no_image_or_label_is_named(odd_dir, keys, message):
  with pytest.raises(UserError, match=f'config.data.keys.*{message}'):
    load(odd_dir, keys)


@pytest.mark.parametrize(
  'workers', [0, pytest.param(1, marks=pytest.mark.slow)]
)
def test_batches(odd_dir, workers):
  data = Data(
    **DATA
    | {
      'name': 'odd_features',
      'data_dir': odd_dir,
      'test_split': 'test',
      'keys': ('photo', 'digit'),
    }
  )
  batches = data.train_batches(
    data.open('train'), size_px=4, batch_size=4, seed=0, start_step=0
  )
  for batch in itertools.islice(batches, 2):
    assert (batch['image'][:, 0, 0, 0] == 10 * batch['label']).all()
  (batch,) = data.eval_batches(data.open('test'), size_px=4, batch_size=2)
  assert sorted(batch['label'].tolist()) == [0, 1] and batch['valid'].all()
  with pytest.raises(UserError, match=r'config.data.keys = .* \(text, text\)'):
    settings.call(Data, vars(data) | {'keys': ('photo',)}, 'config.data')
