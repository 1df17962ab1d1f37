# SPDX-License-Identifier: Apache-2.0
"""`scaled_digits`, a TFDS data set of real digits at random sizes.

Made from the 1,797 handwritten digits (8x8, UCI; E. Alpaydin and C. Kaynak)
that scikit-learn carries: no download. Each image is one digit, enlarged to a
size drawn log-uniformly from 9 to 56 px, at a random place and in a bright
colour on a dark textured canvas of 64 px. The smallest input size that suffices
therefore differs from image to image, and we know why: the digit's size.
"""

import functools
import importlib.util
import io
import math
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from drnet_jax.data import pixels
from drnet_jax.errors import UserError

CANVAS_PX = 64
DIGIT_PX = (9, 56)  # smallest and largest
_SPLIT_SEED = 2021
_TEST_SHARE, _VALIDATION_SHARE = 0.2, 0.1
_TEST_IMAGES, _VALIDATION_IMAGES = 4000, 4000


def compose(
  digit: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
  """Paints a digit, uint8 [8, 8], of ink from 0 to 255 on a canvas.

  Returns uint8 [64, 64, 3], and the side of the digit in px. `rng` decides
  size, place, colours and texture.
  """
  low, high = (math.log(px) for px in DIGIT_PX)
  size = round(math.exp(rng.uniform(low, high)))
  top, left = rng.integers(0, CANVAS_PX - size + 1, 2)

  # A smooth texture: 4x4 random colours around one, enlarged, plus grain.
  paper, ink = rng.uniform(0, 100, 3), rng.uniform(140, 255, 3)
  texture = (paper + rng.normal(0, 16, (4, 4, 3))).astype(np.float32)
  canvas = _enlarge(texture, CANVAS_PX)
  grain = np.frombuffer(rng.bytes(canvas.size), np.int8) >> 3
  canvas += grain.reshape(canvas.shape)
  alpha = _enlarge(digit[..., None].astype(np.float32) / 255, size)
  window = canvas[top : top + size, left : left + size]
  window += alpha.clip(0, 1) * (ink.astype(np.float32) - window)
  return canvas.clip(0, 255).astype(np.uint8), size


def _enlarge(image: np.ndarray, size_px: int) -> np.ndarray:
  """Bicubic enlargement of a small square image, float32 [H, H, C]."""
  height, width, channels = image.shape
  matrix = _enlargement(height, size_px)
  rows = matrix @ image.reshape(height, width * channels)
  return matrix @ rows.reshape(size_px, width, channels)


@functools.cache
def _enlargement(from_px: int, to_px: int) -> np.ndarray:
  """Matrix [to_px, from_px] of Pillow's bicubic enlargement of a line.

  Composing runs for every training image; two small matrix products take a
  quarter of the time of a call into Pillow.
  """
  identity = Image.fromarray(np.eye(from_px, dtype=np.float32))
  return np.asarray(identity.resize((from_px, to_px), Image.Resampling.BICUBIC))


def compose_example(
  example: dict[str, np.ndarray], rng: np.random.Generator, size_px: int
) -> dict[str, np.ndarray]:
  """A fresh training image from an encoded element of 'originals'."""
  if size_px != CANVAS_PX:
    raise UserError(
      f'scaled_digits are {CANVAS_PX} px: the largest of '
      f'config.model.resolutions must be {CANVAS_PX}, not {size_px}'
    )
  image, size = compose(_original(example['image']), rng)
  return example | {'image': image, 'digit_px': np.int32(size)}


@functools.cache  # they are few, and come again and again
def _original(encoded: bytes) -> np.ndarray:
  return pixels.decode(encoded)[..., 0]


class ScaledDigits(tfds.core.GeneratorBasedBuilder):
  """Splits: 'originals' (to compose from), 'validation' and 'test' (fixed).

  The three come from different originals. An element has `image` (uint8 RGB,
  8x8 in 'originals', else 64x64), `label`, and for analysis, never shown to a
  network, `digit_px`, the side of the digit, and `original`, its row in
  scikit-learn's digits: images of one original are not independent.
  """

  VERSION = tfds.core.Version('1.2.0')
  RELEASE_NOTES = {
    '1.0.0': 'First version.',
    '1.1.0': 'The field `original`; the images are the same.',
    '1.2.0': 'As many validation images again; the others are the same.',
  }

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(None, None, 3)),
          'label': tfds.features.ClassLabel(num_classes=10),
          'digit_px': np.int32,
          'original': np.int32,
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://archive.ics.uci.edu/dataset/80',
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    digits = _digits()
    images = np.round(digits[:, :-1] * (255 / 16)).astype(np.uint8)
    images, labels = images.reshape(-1, 8, 8), digits[:, -1]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    num_test = round(_TEST_SHARE * len(images))
    num_validation = round(_VALIDATION_SHARE * len(images))
    test, validation, originals = np.split(
      order, [num_test, num_test + num_validation]
    )

    def as_they_are(rows):
      for i, row in enumerate(rows):
        image = np.repeat(images[row][..., None], 3, -1)
        yield i, _example(image, len(image), labels[row], row)

    def composed(rows, count, seed):
      for i in range(count):
        row = rows[i % len(rows)]
        image, size = compose(images[row], np.random.default_rng((seed, i)))
        yield i, _example(image, size, labels[row], row)

    return {
      'originals': as_they_are(originals),
      'validation': composed(validation, _VALIDATION_IMAGES, seed=1),
      'test': composed(test, _TEST_IMAGES, seed=2),
    }

  def _generate_examples(self):
    raise AssertionError('the split generators yield the examples themselves')


def _digits() -> np.ndarray:
  """scikit-learn's digits, float64 [1797, 65]: ink of 8 x 8 px, and the digit.

  Read from its file: `load_digits` would import all of scikit-learn and SciPy.
  """
  package = importlib.util.find_spec('sklearn')
  folder = pathlib.Path(package.origin).parent / 'datasets' / 'data'
  return np.loadtxt(folder / 'digits.csv.gz', delimiter=',')


def _example(image: np.ndarray, digit_px: int, label: int, original: int):
  encoded = io.BytesIO()
  Image.fromarray(image).save(encoded, 'PNG', compress_level=0)
  return {
    'image': encoded.getvalue(),
    'label': int(label),
    'digit_px': np.int32(digit_px),
    'original': np.int32(original),
  }
