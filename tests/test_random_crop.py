# SPDX-License-Identifier: Apache-2.0
"""Random resized crops: geometry, and one result from any decoder."""

import numpy as np
import pytest
from conftest import encoded
from PIL import Image

from drnet_jax.data import random_crop
from drnet_jax.data.pixels import UnreadableImage
from drnet_jax.data.random_crop import Codec

# Red tells the column of a pixel, green the row: smooth, so that JPEG keeps it.
HEIGHT, WIDTH = 150, 200
PLACES = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
PLACES[..., 0] = np.arange(WIDTH)
PLACES[..., 1] = np.arange(HEIGHT)[:, None]

PILLOW = Codec(random_crop.with_pillow, None)
TURBO = Codec(random_crop.with_turbo, None)
CODECS = [PILLOW, TURBO] if random_crop.optional('simplejpeg') else [PILLOW]
codecs = pytest.mark.parametrize(
  'codec', CODECS, ids=lambda codec: codec.decode.__name__
)


def jpeg(image=PLACES, **options):
  return encoded(Image.fromarray(image), 'JPEG', quality=98, **options)


def crops(data, size_px, count=200, **options):
  rng = np.random.default_rng(4)
  return np.stack(
    [
      random_crop.random_resized_crop(data, size_px, rng, **options)
      for _ in range(count)
    ]
  )


def test_area_and_aspect_are_those_asked_for():
  """Read off the crops' corners; a PNG has them to the grey level."""
  found = crops(encoded(Image.fromarray(PLACES)), 64).astype(float)
  width = (found[:, 32, -1, 0] - found[:, 32, 0, 0]) * 64 / 63
  height = (found[:, -1, 32, 1] - found[:, 0, 32, 1]) * 64 / 63
  share = width * height / (WIDTH * HEIGHT)
  assert 0.06 < share.min() < 0.12 and 0.9 < share.max() <= 1.02
  # Uniform between .08 and 1, but the largest often do not fit.
  assert 0.4 < share.mean() < 0.56
  aspect = width / height
  assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.37
  assert abs(np.log(aspect).mean()) < 0.06
  most = crops(encoded(Image.fromarray(PLACES)), 64, least=0.5).astype(float)
  width = (most[:, 32, -1, 0] - most[:, 32, 0, 0]) * 64 / 63
  height = (most[:, -1, 32, 1] - most[:, 0, 32, 1]) * 64 / 63
  assert 0.47 < (width * height / (WIDTH * HEIGHT)).min() < 0.6


@codecs
@pytest.mark.parametrize('size_px', [8, 20, 64, 190])
@pytest.mark.parametrize('progressive', [False, True])
def test_a_scaled_decode_shows_the_same_place(codec, size_px, progressive):
  """Of a JPEG what is cut out does not depend on how it is decoded."""
  exact = crops(encoded(Image.fromarray(PLACES)), size_px, 20).astype(int)
  found = crops(jpeg(progressive=progressive), size_px, 20, codec=codec)
  assert np.abs(found - exact).max() <= 5


@pytest.mark.skipif(len(CODECS) < 2, reason='simplejpeg is not installed')
@pytest.mark.parametrize(
  'size_px, shape',
  # 58 * (15 / 58) > 15: a box at the border seems to end beyond it.
  [(20, (91, 133)), (64, (91, 133)), (5, (58, 87))],
)
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_both_decoders_give_the_same_pixels(size_px, shape, mode):
  noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  image = Image.fromarray(noise).convert(mode)
  data = encoded(image, 'JPEG', quality=80)
  pillow, turbo = (crops(data, size_px, 30, codec=c) for c in CODECS)
  np.testing.assert_array_equal(pillow, turbo)


@pytest.mark.skipif(
  not random_crop.optional('cv2'), reason='OpenCV is not installed'
)
def test_opencv_enlarges_as_pillow_does():
  noise = np.random.default_rng(0).integers(0, 256, (91, 133, 3), np.uint8)
  data = encoded(Image.fromarray(noise))
  opencv = Codec(random_crop.with_pillow, random_crop.with_opencv)
  pillow, opencv = (
    crops(data, 140, 30, codec=c).astype(int) for c in (PILLOW, opencv)
  )
  assert np.abs(pillow - opencv).max() == 1


@codecs
def test_pictures_that_need_more_than_a_decoder(codec):
  exif = Image.Exif()
  exif[0x0112] = 6  # stored lying on its side: shown, green tells columns
  (turned,) = crops(jpeg(exif=exif), 64, 1, codec=codec).astype(int)
  assert (np.diff(turned[32, :, 1]) <= 0).all() and np.ptp(turned[32, :, 1]) > 9
  cmyk = encoded(Image.new('CMYK', (50, 60)), 'JPEG')
  assert crops(cmyk, 16, 1, codec=codec).min() == 255


@codecs
@pytest.mark.parametrize('keep', [0, 10, 1500])
def test_the_same_files_are_unreadable(codec, keep):
  with pytest.raises(UnreadableImage, match='cannot read'):
    crops(jpeg()[:keep], 16, 1, codec=codec)


@codecs
def test_junk_between_segments_is_forgiven(codec):
  data = jpeg()
  place = data.index(b'\xff\xda')  # start of scan
  odd = data[:place] + b'\x00\x00' + data[place:]
  np.testing.assert_array_equal(
    crops(odd, 16, 1, codec=codec), crops(data, 16, 1, codec=codec)
  )


@pytest.mark.parametrize('shape', [(1, 1), (500, 3), (3, 500), (37, 41)])
@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_pictures_of_any_shape(shape, kind, tmp_path):
  path = tmp_path / 'image'
  Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(path, kind)
  assert crops(str(path), 8, 3).shape == (3, 8, 8, 3)
