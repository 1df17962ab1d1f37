# SPDX-License-Identifier: Apache-2.0
"""RandAugment: torchvision's operations and strengths."""

import numpy as np
import pytest
from PIL import Image
from test_sources import DATA

from drnet_jax import settings
from drnet_jax.data import rand_augment
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError

RAMP = np.zeros((33, 331, 3), np.uint8)
RAMP[...] = np.linspace(0, 255, 331).astype(np.uint8)[:, None]


def outcomes(image, magnitude, *, count=300):
  """Distinct results of one operation."""
  rng = np.random.default_rng(0)
  found = [rand_augment.apply(image, rng, 1, magnitude) for _ in range(count)]
  assert all(x.shape == image.shape and x.dtype == np.uint8 for x in found)
  return {x.tobytes(): x for x in found}


def test_all_operations_are_drawn_and_those_with_a_sign_both_ways():
  noise = np.random.default_rng(1).integers(60, 200, (40, 50, 3), np.uint8)
  # Identity, posterize, solarize, autocontrast, equalize: 5; nine have signs.
  assert len(outcomes(noise, 9)) == 5 + 2 * 9


def test_magnitude_zero_changes_colours_only_where_it_must():
  """Solarize at 255, autocontrast and equalize act at any magnitude."""
  assert len(outcomes(RAMP, 0)) <= 4
  assert RAMP.tobytes() in outcomes(RAMP, 0)


@pytest.mark.parametrize('magnitude', [9, 30])
def test_translations_are_those_of_torchvision(magnitude):
  """150 / 331 of the width at magnitude 30, to either side, black behind."""
  shift = round(150 * magnitude / 30)
  left = np.zeros_like(RAMP)
  left[:, :-shift] = RAMP[:, shift:]
  right = np.zeros_like(RAMP)
  right[:, shift:] = RAMP[:, :-shift]
  found = outcomes(RAMP, magnitude)
  assert left.tobytes() in found and right.tobytes() in found


def test_posterize_and_brightness_at_full_strength():
  found = outcomes(RAMP, 30)
  assert (RAMP & 0b11110000).tobytes() in found  # four bits are left
  darker = np.asarray(Image.fromarray(RAMP).point(lambda x: x * 0.1))
  assert any(np.abs(x.astype(int) - darker).max() <= 1 for x in found.values())


def test_training_uses_it(tmp_path):
  path = tmp_path / 'train' / 'ramp'
  path.mkdir(parents=True)
  Image.fromarray(RAMP).save(path / 'ramp.png')
  settings = DATA | {'data_dir': str(tmp_path), 'validation_split': 'train'}

  def batch(**changes):
    data = Data(**settings | changes)
    stream = data.train_batches(
      data.open('train'), size_px=32, batch_size=8, seed=0, start_step=0
    )
    return next(stream)['image']

  plain, changed = batch(), batch(rand_augment=(2, 15))
  differ = (plain != changed).any((1, 2, 3))
  assert differ.sum() >= 4
  np.testing.assert_array_equal(changed, batch(rand_augment=(2, 15)))


@pytest.mark.parametrize('value', [(2,), (0, 9), (2, 31), (2, -1)])
def test_settings_that_make_no_sense(value):
  with pytest.raises(UserError, match=r'rand_augment = .* is not'):
    settings.call(Data, DATA | {'rand_augment': value}, 'config.data')
