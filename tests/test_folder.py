# SPDX-License-Identifier: Apache-2.0
"""Folders as people have them."""

import collections
import os
import pathlib

import pytest
from PIL import Image
from test_sources import DATA, picture

from drnet_jax.data import folder, pixels, sources
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError


def write(path: pathlib.Path, data: bytes = b'') -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data or picture(0, 0))
  return path


@pytest.fixture
def photos(tmp_path):
  """Two classes of two images, and all that lies about beside them."""
  folder._say_once.cache_clear()
  for name in ('cat', 'dog'):
    for file in ('0.png', '1.JPG'):
      write(tmp_path / 'train' / name / file)
  return tmp_path / 'train'


def load(photos, **changes):
  arguments = {'split': 'train', 'kept': (), 'images_per_class': 0}
  return folder.load(str(photos.parent), **arguments | changes)


def names(files):
  return [os.path.basename(path) for path in files.paths]


def test_hidden_files_are_no_images(photos, capsys):
  for name in ('._0.png', '._1.JPG', '.DS_Store', '.cache/9.png'):
    write(photos / 'cat' / name)
  write(photos / 'cat' / '__MACOSX' / '9.png')
  write(photos / '.git' / '9.png')
  files, classes = load(photos)
  assert classes == ('cat', 'dog') and names(files) == ['0.png', '1.JPG'] * 2
  assert capsys.readouterr().out == f'{photos}: left out: 5 hidden\n'


def test_images_in_no_class_are_counted(photos, capsys):
  for name in ('0.png', '1.jpg', '._0.png', 'notes.txt'):
    write(photos / name)
  assert len(load(photos)[0]) == 4
  assert (
    capsys.readouterr().out == f'{photos}: left out: 2 images in no class\n'
  )


def test_nested_folders_are_read(photos, capsys):
  write(photos / 'cat' / 'more' / 'and more' / '7.webp')
  files, _ = load(photos)
  assert names(files) == ['0.png', '1.JPG', '7.webp', '0.png', '1.JPG']
  assert files.labels == (0, 0, 0, 1, 1)
  assert not capsys.readouterr().out


def test_what_is_left_out_is_counted_in_one_line_said_once(photos, capsys):
  for name in ('a.HEIC', 'b.heic', 'notes.txt', 'README', 'page.eps', 'x.h5'):
    write(photos / 'cat' / name)
  (photos / 'cat' / 'gone.png').symlink_to(photos / 'nowhere.png')
  (photos / 'cat' / 'round.png').symlink_to(photos / 'cat' / 'round.png')
  os.mkfifo(photos / 'dog' / 'pipe.png')
  (photos / 'eel').mkdir()
  for _ in range(2):
    files, classes = load(photos)
  assert classes == ('cat', 'dog') and len(files) == 4
  (line,) = capsys.readouterr().out.splitlines()
  counts = set(line.removeprefix(f'{photos}: left out: ').split(', '))
  if '.heic' in pixels.endings():  # with pillow-heif
    counts.add('2 .heic')
  assert counts == {
    '2 .heic',
    '2 broken links',
    '1 .txt',
    '1 without an ending',
    '1 .eps',
    '1 .h5',
    '1 no files',
    '1 classes without an image',
  }
  assert folder.class_names(str(photos.parent), 'train') == ('cat', 'dog')


def test_links_are_followed_but_not_in_circles(photos, tmp_path):
  elsewhere = write(tmp_path / 'elsewhere' / 'deep' / '8.png')
  (photos / 'cat' / 'link.png').symlink_to(elsewhere)
  (photos / 'cat' / 'up').symlink_to(photos)
  (photos / 'cat' / 'same').symlink_to(photos / 'cat')
  (photos / 'fox').symlink_to(tmp_path / 'elsewhere')
  left_out = collections.Counter()
  found = folder.images(str(photos / 'cat'), left_out)
  # Through 'up' the other classes, each once.
  ends = sorted(os.path.relpath(path, photos / 'cat') for path in found)
  assert ends == [
    '0.png',
    '1.JPG',
    'link.png',
    'up/dog/0.png',
    'up/dog/1.JPG',
    'up/fox/deep/8.png',
  ]
  assert left_out == {'links to folders read before': 2}
  _, classes = load(photos)
  assert classes == ('cat', 'dog', 'fox')


def test_a_class_without_an_image_is_none(photos):
  write(photos / 'eel' / 'notes.txt')
  with pytest.raises(UserError, match='is missing, or has duplicates of: eel'):
    load(photos, kept=('cat', 'eel'))
  with pytest.raises(UserError, match='has duplicates of: fox, wolf'):
    load(photos, kept=('wolf', 'fox'))
  for name in ('cat', 'dog'):
    for file in (photos / name).iterdir():
      file.unlink()
  with pytest.raises(UserError, match='holds no image; left out: 3 classes'):
    load(photos)


def test_endings_are_of_formats_that_are_read():
  ends = set(pixels.endings())
  assert {'.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif'} <= ends
  assert {'.jfif', '.mpo', '.jp2', '.ppm'} <= ends
  assert not {'.pdf', '.eps', '.h5', '.mpg', '.grib', '.wmf', '.txt'} & ends
  assert ('.heic' in ends) == ('HEIF' in Image.OPEN)


def test_an_image_under_a_wrong_name_is_read(photos):
  """The ending says what is an image, the bytes what format it has."""
  write(photos / 'cat' / '2.gif', picture(0, 0))
  data = Data(**DATA | {'data_dir': str(photos.parent), 'test_split': 'train'})
  source = data.open('train')
  assert [
    pixels.decode(source.examples[i]['image']).shape for i in range(5)
  ] == [(9, 12, 3)] * 5
  assert sources.class_names(
    'folder', 'train', data_dir=str(photos.parent), classes=''
  ) == ('cat', 'dog')
