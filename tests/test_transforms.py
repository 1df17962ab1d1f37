# SPDX-License-Identifier: Apache-2.0
"""Every kind of picture that people really have."""

import numpy as np
import pytest
from conftest import encoded
from PIL import Image

from drnet_jax.data import pixels, transforms
from drnet_jax.errors import UserError


def test_cmyk_and_animations():
  cmyk = Image.new('CMYK', (5, 6))
  assert pixels.decode(encoded(cmyk, 'JPEG')).shape == (6, 5, 3)
  frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'blue')]
  moving = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  assert (pixels.decode(moving) == [255, 0, 0]).all()


@pytest.mark.parametrize('keep', [0, 10, 200])
def test_truncated_files_are_refused(keep):
  noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
  whole = encoded(Image.fromarray(noise))
  with pytest.raises(UserError, match='cannot read'):
    pixels.decode(whole[:keep])


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match='nothing.png'):
    pixels.decode(str(tmp_path / 'nothing.png'))


def test_center_crop_takes_the_middle():
  # A white middle column third of a 90 x 30 image.
  image = np.zeros((30, 90, 3), np.uint8)
  image[:, 30:60] = 255
  crop = transforms.center_crop(image, 30, resize_px=30, keep_aspect=True)
  assert crop.shape == (30, 30, 3) and (crop == 255).all()
  bigger = transforms.center_crop(image, 28, resize_px=60, keep_aspect=True)
  assert bigger.shape == (28, 28, 3) and (bigger == 255).all()


@pytest.mark.parametrize('shape', [(1, 1), (500, 3), (3, 500), (37, 41)])
def test_crops_of_any_shape(shape):
  image = np.zeros((*shape, 3), np.uint8)
  small = transforms.center_crop(image, 8, resize_px=9, keep_aspect=True)
  assert small.shape == (8, 8, 3)


def test_random_shift_cuts_from_a_black_border():
  image = np.arange(1, 32 * 32 * 3 + 1).reshape(32, 32, 3) % 255 + 1
  image = image.astype(np.uint8)
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(400):
    found = transforms.random_shift(image, 32, rng)
    rows = np.flatnonzero(found.any((1, 2)))
    columns = np.flatnonzero(found.any((0, 2)))
    seen.add((len(rows), rows[0] > 0))
    kept = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top = 0 if rows[0] else 32 - len(rows)
    left = 0 if columns[0] else 32 - len(columns)
    np.testing.assert_array_equal(
      kept, image[top : top + len(rows), left : left + len(columns)]
    )
  assert {n for n, _ in seen} == {28, 29, 30, 31, 32}
