# SPDX-License-Identifier: Apache-2.0
"""Damages small images of 23 kinds and shows them to every door.

python tests/damaged_images.py COUNT SEED

Prints as JSON how many could still be read, which exceptions escaped that are
not of an unreadable image, and how far the peak of memory rose.
"""

import collections
import io
import json
import os
import sys
import types
import warnings

import numpy as np
from PIL import Image

from drnet_jax.data import pixels, random_crop
from drnet_jax.export.contract import View
from drnet_jax.serve.picture import Picture

_CONTRACT = types.SimpleNamespace(decode_px=16, decode='scaled')
_VIEW = View(16, 16, keep_aspect=True)
_BYTES = (0, 1, 255, 128)  # what headers are most easily broken by


def whole() -> dict[str, bytes]:
  """An image of every kind."""
  noise = np.random.default_rng(0).integers(0, 255, (24, 20, 3))
  image = Image.fromarray(noise.astype(np.uint8))
  exif = Image.Exif()
  exif[0x0112], exif[0x010F], exif[0x011A] = 6, 'maker', 72.0
  exif.get_ifd(0x8769)[0x9003] = '2020:01:01'
  kinds = {
    'jpeg': (image, {}),
    'jpeg exif': (image, {'exif': exif}),
    'jpeg progressive': (image, {'progressive': True}),
    'png exif': (image, {'exif': exif}),
    'png': (image.convert('P'), {'transparency': b'\0\10\20'}),
    'webp exif': (image, {'exif': exif}),
    'gif': (image, {'save_all': True, 'append_images': [image.rotate(90)]}),
    'tiff': (image, {'exif': exif}),
    'tiff lzw': (image, {'compression': 'tiff_lzw'}),
    'bmp': (image, {}),
    'ppm': (image, {}),
    'tga': (image, {}),
    'ico': (image, {}),
    'jpeg2000': (image, {}),
    'dds': (image, {}),
    'pcx': (image, {}),
    'sgi': (image, {}),
    'icns': (image.resize((32, 32)), {}),
    'mpo': (image, {'save_all': True, 'append_images': [image]}),
    'im': (image, {}),
    'msp': (image.convert('1'), {}),
    'xbm': (image.convert('1'), {}),
  }
  if '.avif' in Image.registered_extensions():
    kinds['avif'] = (image, {})
  files = {}
  for name, (picture, options) in kinds.items():
    file = io.BytesIO()
    picture.save(file, name.split()[0].upper(), **options)
    files[name] = file.getvalue()
  return files


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
  """A few other bytes, most of them in the header; sometimes cut off."""
  data = bytearray(data)
  within = len(data) if rng.random() < 0.3 else min(len(data), 300)
  for _ in range(rng.integers(1, 4)):
    value = rng.choice([*_BYTES, rng.integers(0, 256)])
    data[rng.integers(0, within)] = value
  if rng.random() < 0.2:
    data = data[: rng.integers(1, len(data))]
  return bytes(data)


def _doors(data: bytes):
  """What is called with a file, and the only exception it may raise."""
  bad = pixels.UnreadableImage
  yield 'decode', bad, lambda: pixels.decode(data)
  yield (
    'training',
    bad,
    lambda: random_crop.random_resized_crop(data, 16, np.random.default_rng(0)),
  )
  yield 'predict', bad, lambda: Picture(data, _CONTRACT).crop(_VIEW)


def peak_mib() -> float:
  """Not ru_maxrss, which a process inherits from who started it."""
  with open('/proc/self/status') as file:
    (peak,) = (line for line in file if line.startswith('VmHWM'))
  return int(peak.split()[1]) / 1024


def main(count: int, seed: int) -> None:
  warnings.simplefilter('ignore')
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff complains by itself
  files, rng = list(whole().items()), np.random.default_rng(seed)
  for _, data in files:
    for _, _, run in _doors(data):
      run()
  before = peak_mib()
  read, escaped = collections.Counter(), collections.Counter()
  for i in range(count):
    name, data = files[i % len(files)]
    data = damaged(data, rng)
    for door, expected, run in _doors(data):
      try:
        run()
        read[door] += 1
      except Exception as error:
        if type(error) is not expected:
          escaped[f'{door}, {name}: {type(error).__name__}: {error}'] += 1
  risen = peak_mib() - before
  print(
    json.dumps(
      {
        'files': count,
        'kinds': len(files),
        'read': read,
        'escaped': escaped,
        'risen_mib': round(risen),
      }
    )
  )


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
