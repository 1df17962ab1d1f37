# SPDX-License-Identifier: Apache-2.0
"""Folders and packed files as data sets."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from conftest import encoded, pack
from PIL import Image

from configs import in100
from drnet_jax import settings
from drnet_jax.data import pixels, sources, transforms
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError

CLASSES = ('bird', 'cat', 'dog')
PER_CLASS = 4
DATA = {
  'name': 'folder',
  'data_dir': '',
  'train_split': 'train',
  'validation_split': 'val',
  'test_split': 'val',
  'epoch_images': 0,
  'least_epoch_images': 0,
  'augmentation': 'random_resized_crop',
  'least_crop': 0.08,
  'flip': 0.0,
  'mixup': 0.0,
  'cutmix': 0.0,
  'rand_augment': (),
  'resize_px': 0,
  'keep_aspect': True,
  'classes': '',
  'class_map': '',
  'unlabelled': '',
  'images_per_class': 0,
  'held_out': 0,
  'max_bad_images': 0,
  'max_pixels': 0,
  'keys': ('image', 'label'),
  'threads': 1,
  'workers': 0,
}


def picture(label, i) -> bytes:
  """A grey square whose shade tells class and number."""
  return encoded(Image.new('RGB', (12, 9), (50 * label + i,) * 3))


def shade(example) -> int:
  return int(pixels.decode(example['image'])[0, 0, 0])


@pytest.fixture
def folder(tmp_path):
  for split, name in itertools.product(('train', 'val'), CLASSES):
    path = tmp_path / split / name
    path.mkdir(parents=True)
    for i in range(PER_CLASS):
      image = picture(CLASSES.index(name), i)
      (path / f'{i}.png').write_bytes(image)
    (path / 'notes.txt').write_text('no image')
  return str(tmp_path)


@pytest.fixture
def packed(tmp_path):
  """Two of each class to train, two to validate; a name occurs twice."""
  labels = np.repeat(np.arange(3), PER_CLASS)
  images = [picture(j, i % PER_CLASS) for i, j in enumerate(labels)]
  return pack(
    tmp_path / 'images.npz',
    images,
    label=labels,
    split=np.tile([0, 0, 1, 1], 3),
    class_name=np.array([b'crane', b'cat', b'crane']),
  )


@pytest.fixture
def some_classes(tmp_path):
  path = tmp_path / 'classes.txt'
  path.write_text('dog\nbird\n')
  return str(path)


def test_folder(folder):
  source = sources.load('folder', 'train', data_dir=folder)
  assert source.class_names == CLASSES
  found = [(e['label'], shade(e)) for e in source.examples]
  assert found == [(j, 50 * j + i) for j in range(3) for i in range(PER_CLASS)]
  names = sources.class_names('folder', 'train', data_dir=folder, classes='')
  assert names == CLASSES


@pytest.mark.parametrize('held_out', [3, 0.25])
def test_images_can_be_held_out_by_number_or_by_share(folder, held_out):
  fields = DATA | {'data_dir': folder, 'held_out': held_out}
  data = Data(**fields)
  assert len(data.open('train').examples) == 9
  assert len(data.open('held_out').examples) == 3
  with pytest.raises(UserError, match='held_out = 0.01 of 12 images'):
    Data(**fields | {'held_out': 0.01}).open('held_out')
  # Of a single folder as many to test on; the held-out ones stay as they were.
  both = Data(**fields | {'test_split': 'held_out_test'})
  rows = [
    both.open(split).examples.rows.tolist()
    for split in ('train', 'held_out', 'held_out_test')
  ]
  assert sorted(sum(rows, [])) == list(range(12))
  assert [len(x) for x in rows] == [6, 3, 3]
  assert rows[1] == data.open('held_out').examples.rows.tolist()


def test_an_epoch_of_few_images_may_take_them_more_than_once(folder):
  def steps(**changes):
    data = Data(**DATA | {'data_dir': folder} | changes)
    source = data.open('train')
    return data, source, data.steps_per_epoch(source, batch_size=4)

  assert steps()[-1] == steps(least_epoch_images=8)[-1] == 3
  assert steps(epoch_images=5, least_epoch_images=8)[-1] == 1
  data, source, count = steps(least_epoch_images=39)
  assert count == 9
  batches = data.train_batches(
    source, size_px=8, batch_size=4, seed=0, start_step=0
  )
  shades = [
    shade
    for b in itertools.islice(batches, count)
    for shade in b['image'][:, 0, 0, 0]
  ]
  assert {*np.unique(shades, return_counts=True)[1]} == {3}


@pytest.mark.parametrize('kind', ['folder', 'packed'])
def test_images_without_a_class_are_trained_on_too(request, tmp_path, kind):
  path = request.getfixturevalue(kind)
  more = tmp_path / 'more' / 'deep'
  more.mkdir(parents=True)
  for i in range(2):
    (more / f'{i}.png').write_bytes(picture(4, i))
  data = Data(
    **DATA | {'name': kind, 'data_dir': path, 'unlabelled': str(more.parent)}
  )
  labelled = data.open('train')
  source = data.with_unlabelled(labelled)
  assert source.class_names == labelled.class_names
  found = [(e['label'], shade(e)) for e in source.examples]
  first = [(e['label'], shade(e)) for e in labelled.examples]
  assert found == [*first, (-1, 200), (-1, 201)]
  assert source.examples.name(len(first)) == str(more / '0.png')
  (batch,) = itertools.islice(
    data.train_batches(
      source, size_px=8, batch_size=len(found), seed=0, start_step=0
    ),
    1,
  )
  assert sorted(batch['label'].tolist()) == sorted(x for x, _ in found)
  empty = dataclasses.replace(data, unlabelled=str(tmp_path / 'train' / 'none'))
  with pytest.raises(UserError, match="none' holds no image; .*cannot be read"):
    empty.with_unlabelled(labelled)
  with pytest.raises(UserError, match="needs name = 'folder' or 'packed'"):
    dataclasses.replace(data, name='cifar10').with_unlabelled(labelled)


def test_some_classes_in_their_own_order(folder, some_classes):
  source = sources.load(
    'folder',
    'train',
    data_dir=folder,
    classes=some_classes,
    images_per_class=3,
  )
  assert source.class_names == ('dog', 'bird')
  labels = [e['label'] for e in source.examples]
  assert labels == [0, 0, 0, 1, 1, 1]
  shades = [shade(e) for e in source.examples]
  assert [s // 50 for s in shades] == [2, 2, 2, 0, 0, 0]
  again = sources.load(
    'folder',
    'train',
    data_dir=folder,
    classes=some_classes,
    images_per_class=3,
  )
  assert again.examples == source.examples


def test_packed_file(packed):
  train = sources.load('packed', 'train', data_dir=packed)
  assert train.class_names == ('crane', 'cat', 'crane')
  assert [shade(e) for e in train.examples] == [0, 1, 50, 51, 100, 101]
  # Labels by place, though two classes share a name.
  assert [e['label'] for e in train.examples] == [0, 0, 1, 1, 2, 2]
  part = sources.load('packed', 'val[:50%]+train[5:]', data_dir=packed)
  assert [shade(e) for e in part.examples] == [2, 3, 52, 101]


def test_packed_file_of_some_classes(packed, tmp_path):
  path = tmp_path / 'one.txt'
  path.write_text('cat\n')
  source = sources.load(
    'packed', 'val', data_dir=packed, classes=str(path), images_per_class=1
  )
  assert source.class_names == ('cat',)
  assert [e['label'] for e in source.examples] == [0]
  path.write_text('crane\n')
  with pytest.raises(UserError, match='or has duplicates of: crane'):
    sources.load('packed', 'val', data_dir=packed, classes=str(path))


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'split': 'test'}, "no split 'test', only train, val"),
    ({'data_dir': '/nowhere'}, 'config.data.data_dir'),
    ({'classes': '/nowhere'}, 'config.data.classes cannot be read'),
    ({'name': 'packed', 'data_dir': __file__}, 'damaged, or no packed file'),
    ({'name': 'scaled_digits', 'images_per_class': 1}, 'need name = '),
  ],
)
def test_what_is_not_there_is_named(folder, arguments, message):
  given = {'name': 'folder', 'split': 'train', 'data_dir': folder}
  with pytest.raises(UserError, match=message):
    sources.load(**given | arguments)


@pytest.mark.parametrize('dtype', ['U', 'S'])
def test_packed_names_in_any_writing_and_an_empty_image(tmp_path, dtype):
  """The empty image is one that cannot be read, and is counted."""
  names = ['café', 'thé', '茶']
  if dtype == 'S':
    names = [name.encode() for name in names[:2]] + ['thé'.encode('latin-1')]
  path = pack(
    tmp_path / 'images.npz',
    [b'', picture(0, 3)],
    label=[0, 1],
    split=[0, 0],
    class_name=np.array(names),
  )
  source = sources.load('packed', 'train', data_dir=path)
  expected = ('café', 'thé', '茶' if dtype == 'U' else 'thé')
  assert source.class_names == expected
  data = Data(**DATA | {'name': 'packed', 'data_dir': path})
  data = dataclasses.replace(data, train_split='train', max_bad_images=1)
  batch = next(
    data.train_batches(source, size_px=4, batch_size=2, seed=0, start_step=0)
  )
  assert batch['label'].tolist() == [1, 1] and source.unreadable == {0}


@pytest.mark.parametrize(
  'data',
  [
    'thé\ncafé\n'.encode(),
    'thé\r\ncafé'.encode('utf-8-sig'),
    'thé\r\n\r\n café \r\n'.encode('utf-16'),
    'thé\ncafé\n'.encode('utf-16-le'),
    'thé\ncafé\n'.encode('utf-16-be'),
    'thé\r\ncafé\r\n'.encode('latin-1'),
    'thé\rcafé'.encode('cp1252'),
  ],
)
def test_lists_of_classes_in_any_encoding(tmp_path, data):
  path = tmp_path / 'classes.txt'
  path.write_bytes(data)
  assert sources.read_classes(str(path)) == ('thé', 'café')


def test_wrong_splits_and_arrays_of_a_packed_file(packed, tmp_path):
  with pytest.raises(UserError, match='there are train, val'):
    sources.load('packed', 'test', data_dir=packed)
  with pytest.raises(UserError, match='holds no image'):
    sources.load('packed', 'val[:0]', data_dir=packed)
  path = str(tmp_path / 'other.npz')
  np.savez(path, data=np.zeros(3))
  with pytest.raises(UserError, match='lacks class_name, label, offsets'):
    sources.load('packed', 'val', data_dir=path)


def test_arrays_of_a_packed_file_that_do_not_fit(packed, tmp_path):
  path = str(tmp_path / 'wrong.npz')
  with np.load(packed) as file:
    arrays = dict(file)
  for changes, message in (
    ({'label': arrays['label'] - 1}, 'labels from -1 to 1, for 3 classes'),
    ({'label': arrays['label'][1:]}, '11 labels need as many splits'),
    ({'offsets': arrays['offsets'][::-1]}, 'offsets do not ascend'),
    ({'data': arrays['data'][:-9]}, 'offsets do not ascend within data'),
    (
      {'offsets': arrays['offsets'][::-1].astype(np.uint64)},
      'offsets do not ascend',
    ),
    ({'label': arrays['label'] / 1}, 'label holds 12 of float64'),
    ({'label': arrays['label'][:, None]}, 'label holds 12 x 1 of'),
    ({'offsets': arrays['offsets'] / 1}, 'offsets holds 13 of float64'),
    ({'class_name': np.array(['a', 'b', 'c'], object)}, 'no packed file'),
    (
      {'class_name': arrays['class_name'][:0], 'label': arrays['label'][:0]}
      | {'offsets': arrays['offsets'][:1], 'split': arrays['split'][:0]},
      'class_name is empty',
    ),
  ):
    np.savez(path, **arrays | changes)
    with pytest.raises(UserError, match=message):
      sources.load('packed', 'val', data_dir=path)
  with open(packed, 'rb') as file:
    whole = file.read()
  with open(path, 'wb') as file:
    file.write(whole[:-200])
  with pytest.raises(UserError, match='is damaged'):
    sources.load('packed', 'val', data_dir=path)


def test_splits_of_other_classes_are_refused(folder, tmp_path):
  data = Data(**DATA | {'data_dir': folder})
  assert len(data.open('val').examples) == 3 * PER_CLASS
  shutil.rmtree(tmp_path / 'val' / 'cat')
  with pytest.raises(UserError, match="other classes .* missing: 'cat'"):
    data.open('val')


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'augmentation': 'compose_digits'}, 'is for scaled_digits'),
    ({'flip': 7.0}, r'flip = 7.0 is not a number in \[0, 1\]'),
    ({'mixup': -0.2}, r'mixup = -0.2 is not a number in \[0, inf\)'),
    ({'workers': -1}, 'workers = -1 is not a whole number'),
    ({'images_per_class': -4}, 'images_per_class = -4 is not a whole'),
  ],
)
def test_settings_that_make_no_sense(changes, message):
  with pytest.raises(UserError, match=message):
    settings.call(Data, DATA | changes, 'config.data')


def test_a_crop_larger_than_the_image_is_resized_to(folder):
  data = Data(**DATA | {'data_dir': folder, 'resize_px': 16})
  with pytest.raises(UserError, match='resize_px = 16 is less than'):
    data.eval_image(data.open('val').examples[0]['image'], 64)


def test_our_hundred_classes_of_imagenet():
  names = sources.class_names(
    'folder', 'train', data_dir='', classes='imagenet100'
  )
  everything = sources.class_names(
    'imagenet2012', 'train', data_dir='', classes=''
  )
  drawn = np.sort(np.random.default_rng(0).permutation(1000)[:100])
  assert names == tuple(everything[i] for i in drawn)
  assert in100.get_config().data.classes == 'imagenet100'


def test_evaluation_keeps_the_aspect_or_squashes():
  image = np.zeros((20, 40, 3), np.uint8)
  image[:, :10] = 255
  kept = transforms.center_crop(image, 20, resize_px=20, keep_aspect=True)
  squashed = transforms.center_crop(image, 20, resize_px=20, keep_aspect=False)
  # The white quarter on the left is cut off, or five columns wide.
  assert not kept.any()
  assert squashed[10, :, 0].astype(int).sum() == pytest.approx(5 * 255, rel=0.1)
