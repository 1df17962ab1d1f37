# SPDX-License-Identifier: Apache-2.0
"""One table of pixels for all doors, and nothing that a decoder can break."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
from conftest import encoded
from PIL import Image, PngImagePlugin

from drnet_jax.data import pixels, random_crop, transforms
from drnet_jax.data.pixels import UnreadableImage
from drnet_jax.errors import UserError
from drnet_jax.export.contract import View
from drnet_jax.serve.picture import Picture

CONTRACT = types.SimpleNamespace(decode_px=16, decode='scaled')
VIEW = View(16, 16, keep_aspect=True)
# Red runs along, green down, so that every turn shows.
PHOTO = np.zeros((30, 40, 3), np.uint8)
PHOTO[..., 0] = np.linspace(20, 250, 40)
PHOTO[..., 1] = np.linspace(20, 250, 30)[:, None]
GREY = PHOTO[..., 0]


def exif(*entries) -> bytes:
  """EXIF of entries (tag, type, count, value in 4 bytes or where it lies)."""
  rows = b''.join(struct.pack('<HHL4s', *entry) for entry in entries)
  head = b'II*\0' + struct.pack('<LH', 8, len(entries))
  return b'Exif\0\0' + head + rows + bytes(4)


def turned(value=6, kind=3, count=1, order='<'):
  if order == '>':
    return b'Exif\0\0MM\0*' + struct.pack(
      '>LHHHLHHL', 8, 1, 0x112, kind, count, value, 0, 0
    )
  return (0x112, kind, count, struct.pack('<L', value))


FAR = struct.pack('<L', 2**31)  # beyond the end
TEXT = b'72\0\0'


def png(image, *chunks):
  """A PNG with chunks of (kind, data) before its pixels."""
  data = encoded(image)
  place = data.index(b'IDAT') - 4
  added = b''.join(
    struct.pack('>L', len(body))
    + kind
    + body
    + struct.pack('>L', zlib.crc32(kind + body))
    for kind, body in chunks
  )
  return data[:place] + added + data[place:]


def odd_images():
  """Name: file, and what it shows (None for what is not asked)."""
  photo, grey = Image.fromarray(PHOTO), Image.fromarray(GREY)
  alpha = np.dstack([PHOTO, np.full_like(GREY, 255)])
  alpha[:, :20, 3] = 0
  on_white = PHOTO.copy()
  on_white[:, :20] = 255
  deep = GREY.astype(np.uint16) * 257
  palette = photo.quantize(16)
  text = PngImagePlugin.PngInfo()
  text.add_text('prompt', 'x' * 2_000_000, zip=True)
  three = np.repeat(GREY[..., None], 3, -1)
  clockwise = np.rot90(PHOTO, -1)
  white = three.copy()
  white[:, :20] = 255
  of_palette = np.asarray(palette.convert('RGB'))
  is_clear = (np.asarray(palette) == 3)[..., None]
  shade = int(deep[0, 7])
  clear = three.copy()
  clear[deep == shade] = 255
  tiff = Image.Exif()
  tiff[0x112] = 6
  files = {
    'rgb.png': (encoded(photo), PHOTO),
    'grey.png': (encoded(grey), three),
    'grey16.png': (encoded(Image.fromarray(deep)), three),
    'grey16.tif': (encoded(Image.fromarray(deep), 'TIFF'), three),
    'clear16.png': (encoded(Image.fromarray(deep), transparency=shade), clear),
    'grey16.pgm': (encoded(Image.fromarray(deep), 'PPM'), three),
    'int32.tif': (encoded(Image.fromarray(GREY.astype('i4')), 'TIFF'), three),
    'float.tif': (
      encoded(Image.fromarray(GREY.astype('f4') / 255), 'TIFF'),
      three,
    ),
    'one.png': (encoded(grey.convert('1')), None),
    'alpha.png': (encoded(Image.fromarray(alpha)), on_white),
    'la.png': (encoded(Image.fromarray(alpha[..., [0, 3]])), white),
    'palette.png': (encoded(palette), of_palette),
    'clear.png': (
      encoded(palette, transparency=3),
      np.where(is_clear, 255, of_palette),
    ),
    'cmyk.jpg': (encoded(photo.convert('CMYK'), 'JPEG'), None),
    'lab.tif': (encoded(photo.convert('LAB'), 'TIFF'), None),
    'moving.webp': (
      encoded(
        photo,
        'WEBP',
        save_all=True,
        append_images=[grey.convert('RGB')],
        lossless=True,
      ),
      PHOTO,
    ),
    'bmp.bmp': (encoded(photo, 'BMP'), PHOTO),
    'two.jpg': (
      encoded(photo, 'MPO', save_all=True, append_images=[photo]),
      None,
    ),
    'large.jpg': (encoded(photo.resize((400, 300)), 'JPEG'), None),
    'long_text.png': (encoded(photo, pnginfo=text), PHOTO),
    'profile.png': (encoded(photo, icc_profile=bytes(1_500_000)), PHOTO),
    'turned.png': (encoded(photo, exif=exif(turned())), clockwise),
    'turned.webp': (
      encoded(photo, 'WEBP', exif=exif(turned()), lossless=True),
      clockwise,
    ),
    'turned.tif': (encoded(photo, 'TIFF', exif=tiff), clockwise),
  }
  notes = {
    'plain': b'',
    'text_for_a_number': exif(turned(), (0x11A, 2, 3, TEXT)),
    'text_for_a_place': exif(turned(), (0x8769, 2, 3, TEXT)),
    'cut': b'Exif\0\0II*\0',
    'nothing': b'Exif\0\0',
    'orientation_9': exif(turned(9)),
    'orientation_0': exif(turned(0)),
    'orientation_twice': exif(turned(6 + (6 << 16), count=2)),
    'long': exif(turned(kind=4)),
    'big_endian': turned(order='>'),
    'twice': b'Exif\0\0' + exif(turned()),
  }
  for name, data in notes.items():
    jpeg = encoded(photo, 'JPEG', quality=95, exif=data)
    files[f'{name}.jpg'] = (jpeg, None)
  return files


ODD = odd_images()
DOORS = {
  'evaluation': pixels.decode,
  'training': lambda data: random_crop.random_resized_crop(
    data, 16, np.random.default_rng(0)
  ),
  'predict': lambda data: Picture(data, CONTRACT).crop(VIEW),
}


@pytest.mark.parametrize('name', ODD)
def test_a_file_the_pil_image_and_the_array_are_the_same(name, tmp_path):
  data, expected = ODD[name]
  found = pixels.decode(data)
  if expected is not None:
    np.testing.assert_array_equal(found, expected)
  (tmp_path / name).write_bytes(data)
  np.testing.assert_array_equal(pixels.decode(tmp_path / name), found)
  for door in ('training', 'predict'):
    assert DOORS[door](data).shape == (16, 16, 3)
  if name in ('long_text.png', 'profile.png'):
    return  # Pillow's own limits, of whoever opens them
  with Image.open(io.BytesIO(data)) as image:
    np.testing.assert_array_equal(pixels.decode(image), found)
    # An array has neither a palette nor notes.
    has_notes = {'transparency', 'exif'} & set(image.info) or 'turned' in name
    if image.mode in ('1', 'L', 'LA', 'RGB', 'RGBA', 'I;16', 'F') and (
      not has_notes
    ):
      np.testing.assert_array_equal(pixels.decode(np.asarray(image)), found)


@pytest.mark.parametrize(
  'name, is_turned',
  [
    ('plain', False),
    ('text_for_a_number', True),
    ('text_for_a_place', True),
    ('cut', False),
    ('nothing', False),
    ('orientation_9', False),
    ('orientation_0', False),
    ('orientation_twice', True),
    ('long', True),
    ('big_endian', True),
    ('twice', True),
  ],
)
def test_only_the_orientation_of_exif_counts(name, is_turned):
  shape = pixels.decode(ODD[f'{name}.jpg'][0]).shape
  assert shape == ((40, 30, 3) if is_turned else (30, 40, 3))


@pytest.mark.parametrize('value', range(1, 9))
def test_every_orientation_is_pillows(value):
  """Its own, where EXIF is in order."""
  with Image.open(io.BytesIO(encoded(Image.fromarray(PHOTO)))) as image:
    image.info['exif'] = exif(turned(value))
    expected = {
      1: PHOTO,
      2: PHOTO[:, ::-1],
      3: PHOTO[::-1, ::-1],
      4: PHOTO[::-1],
      5: PHOTO.transpose(1, 0, 2),
      6: np.rot90(PHOTO, -1),
      7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
      8: np.rot90(PHOTO),
    }
    np.testing.assert_array_equal(pixels.decode(image), expected[value])


def test_a_damaged_tag_before_the_orientation_does_not_hide_it():
  data = encoded(
    Image.fromarray(PHOTO), 'JPEG', exif=exif((0x10F, 2, 999, FAR), turned())
  )
  assert pixels.decode(data).shape == (40, 30, 3)


def test_notes_of_the_camera_may_have_a_header_of_their_own():
  notes = b'MM\0*\0\0\0\x08\0\0'  # of the other byte order
  data = encoded(Image.fromarray(PHOTO), 'JPEG', exif=exif(turned()) + notes)
  assert pixels.decode(data).shape == (40, 30, 3)


def test_arrays_of_two_bytes_and_of_two_channels():
  deep = GREY.astype(np.uint16) * 257
  three = np.repeat(GREY[..., None], 3, -1)
  for x in (deep, deep.astype('>u2'), np.dstack([GREY, GREY * 0 + 255])):
    np.testing.assert_array_equal(pixels.decode(x), three)
  rgb = (PHOTO.astype(np.uint16) << 8) + 200  # the lower byte does not count
  np.testing.assert_array_equal(pixels.decode(rgb), PHOTO)


@pytest.mark.parametrize(
  'image, message',
  [
    (Image.new('F', (4, 4), 200.0), 'within 0 and 1, these are from 200.0'),
    (Image.new('I', (4, 4), 70000), 'within 0 and 255'),
    (Image.new('I', (4, 4), -1), 'within 0 and 255'),
  ],
)
def test_pixels_that_would_need_a_guess_are_refused(image, message, tmp_path):
  path = tmp_path / 'guess.tif'
  image.save(path)
  with pytest.raises(UnreadableImage, match=f'guess.tif.*{message}'):
    pixels.decode(str(path))
  for source in (image, np.asarray(image)):
    with pytest.raises(UnreadableImage, match=message):
      pixels.decode(source)


DAMAGED = {
  'empty': b'',
  'page': b'<html>404</html>',
  'jpeg': ODD['plain.jpg'][0][:-40],
  'start': b'\xff\xd8\xff\xe0',
  'png': ODD['rgb.png'][0][:-60],
  'script': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
}


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_files_are_unreadable_images(door, name):
  with pytest.raises(UnreadableImage, match='cannot read'):
    DOORS[door](DAMAGED[name])


@pytest.mark.parametrize(
  'error', [MemoryError, RuntimeError('x\ny'), KeyError(3), struct.error('z')]
)
def test_whatever_a_decoder_raises_is_one_unreadable_image(monkeypatch, error):
  def fail(*_):
    raise error

  for name in ('open', 'Image.convert', 'Image.load'):
    target = Image.Image if '.' in name else Image
    monkeypatch.setattr(target, name.split('.')[-1], fail)
  monkeypatch.setattr(pixels, '_Jpeg', fail)
  for data in (ODD['plain.jpg'][0], ODD['alpha.png'][0]):
    for door in DOORS.values():
      with pytest.raises(UnreadableImage, match='^cannot read .* bytes.*$'):
        door(data)
  with pytest.raises(UnreadableImage, match='cannot read the PIL image'):
    pixels.decode(Image.new('P', (3, 3)))


# How much.


def header_of_a_png(width, height):
  """What says that it has so many pixels, of one bit, and none of them."""
  body = struct.pack('>LLBBBBB', width, height, 1, 0, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + struct.pack('>L', 13)
    + b'IHDR'
    + body
    + struct.pack('>L', zlib.crc32(b'IHDR' + body))
    + bytes(4)
    + b'IDAT'
    + struct.pack('>L', zlib.crc32(b'IDAT'))
  )


@pytest.mark.parametrize('door', DOORS)
def test_too_many_pixels_are_refused_with_what_allows_them(door):
  with pytest.raises(UnreadableImage, match='set DRNET_.*data.max_pixels'):
    DOORS[door](header_of_a_png(30_000, 30_000))


def test_the_limit_can_be_set(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
  data = ODD['rgb.png'][0]
  with pytest.raises(UnreadableImage, match='1200 pixels|30 pixels'):
    pixels.decode(data, max_pixels=1199)
  np.testing.assert_array_equal(pixels.decode(data, max_pixels=1200), PHOTO)
  with pytest.raises(UnreadableImage, match='more than 1199'):
    random_crop.random_resized_crop(
      data, 8, np.random.default_rng(0), max_pixels=1199
    )


def test_the_limit_of_the_environment(monkeypatch):
  monkeypatch.setenv('DRNET_JAX_MAX_PIXELS', '1199')
  pixels._usual_limit.cache_clear()
  try:
    with pytest.raises(UnreadableImage, match='more than 1199'):
      pixels.decode(ODD['rgb.png'][0])
    pixels._usual_limit.cache_clear()
    monkeypatch.setenv('DRNET_JAX_MAX_PIXELS', 'many')
    with pytest.raises(UserError, match="'many' in the environment is no num"):
      pixels.decode(ODD['rgb.png'][0])
  finally:
    monkeypatch.undo()
    pixels._usual_limit.cache_clear()


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size():
  photo = Image.fromarray(PHOTO).resize((400, 300))
  for progressive in (False, True):
    data = encoded(photo, 'JPEG', progressive=progressive)
    if progressive:  # its coefficients are all held
      with pytest.raises(UnreadableImage, match='400 x 300 pixels, more than'):
        pixels.decode(data, max_pixels=8000)
      continue
    found = pixels.decode(data, max_pixels=8000)
    assert found.shape == (75, 100, 3)
    small = np.asarray(photo.resize((100, 75), Image.Resampling.BOX))
    assert np.abs(found.astype(int) - small).mean() < 2
    crop = random_crop.random_resized_crop(
      data, 300, np.random.default_rng(0), max_pixels=8000
    )
    assert crop.shape == (300, 300, 3)


def test_conversion_in_strips_changes_nothing(monkeypatch):
  whole = {name: pixels.decode(data) for name, (data, _) in ODD.items()}
  monkeypatch.setattr(pixels, '_AT_ONCE', 128)
  for name, (data, _) in ODD.items():
    np.testing.assert_array_equal(pixels.decode(data), whole[name])


def test_of_a_strip_the_middle_is_resized():
  image = np.zeros((2, 6000, 3), np.uint8)
  image[:, 2998:3002] = 200
  crop = transforms.center_crop(image, 10, resize_px=10, keep_aspect=True)
  assert (crop == 200).all()
  # As wide as before, it is as before: eight times the short side.
  image = np.random.default_rng(0).integers(0, 256, (5, 40, 3), np.uint8)
  np.testing.assert_array_equal(
    transforms.center_crop(image, 8, resize_px=10, keep_aspect=True),
    transforms.resize(image, 80, 10)[1:9, 36:44],
  )


_PEAK = """
import sys
import numpy as np
from damaged_images import peak_mib
from drnet_jax.data import pixels, random_crop, transforms
path, size = sys.argv[1], 224
before = peak_mib()
# Held by nothing here, as by its doors.
transforms.center_crop(
  pixels.decode(path), size, resize_px=256, keep_aspect=True
)
random_crop.random_resized_crop(path, size, np.random.default_rng(0))
print(peak_mib() - before)
"""


@pytest.mark.parametrize(
  'size, kind, most_mib',
  [
    ((1, 65_000), 'PNG', 40),
    ((1, 65_000), 'JPEG', 40),
    ((60_000, 1), 'BMP', 40),
    ((4000, 3000), 'PNG', 150),  # 12 MPixels: 8 bytes each, and the libraries
  ],
)
def test_memory_is_that_of_the_pixels(tmp_path, size, kind, most_mib):
  path = str(tmp_path / 'image')
  Image.new('RGB', size, 'red').save(path, kind)
  done = subprocess.run(
    [sys.executable, '-c', _PEAK, path],
    cwd=os.path.dirname(__file__),
    capture_output=True,
    text=True,
    check=True,
  )
  assert 0 < float(done.stdout) < most_mib


@pytest.mark.parametrize(
  'count, seed',
  [
    (230, 0),
    pytest.param(
      50_000,
      1,
      marks=[pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(1800)],
    ),
  ],
)
def test_nothing_escapes_from_damaged_files(count, seed):
  """Ten of each kind in CI; a header may claim 89 million pixels of 4 bytes."""
  script = pathlib.Path(__file__).with_name('damaged_images.py')
  done = subprocess.run(
    [sys.executable, script, str(count), str(seed)],
    capture_output=True,
    text=True,
    check=True,
    cwd=script.parents[1],
    env=os.environ | {'PYTHONPATH': str(script.parents[1])},
  )
  found = json.loads(done.stdout)
  assert found['files'] == count and not found['escaped']
  assert found['risen_mib'] < 1024
  # Every door reads the same files; run.py minds damaged texts of a PNG.
  assert np.ptp(list(found['read'].values())) <= 0.01 * count
  assert 0.3 < found['read']['decode'] / count < 0.7
