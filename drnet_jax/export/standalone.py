# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model with onnxruntime, numpy and Pillow; no JAX.

    python run.py [--policy=best --gmacs=2.0] photo.jpg more.png

This file needs nothing else of drnet_jax and is copied into every export.
"""

import argparse
import json
import os
import zlib

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = os.path.dirname(os.path.abspath(__file__))


class Model:
  """An exported model.

  Args:
    folder: of the export.
    policy: a family of the policies in contract.json: 'best', 'cascade', ...;
      'usual' for what drnet_jax does without a budget.
    gmacs: average cost to stay under; None for the most accurate.
  """

  def __init__(self, folder, *, policy='usual', gmacs=None):
    with open(os.path.join(folder, 'contract.json')) as file:
      self.contract = contract = json.load(file)
    rows = [row for row in contract['policies'] if row['family'] == policy]
    if gmacs is not None:
      rows = [r for r in rows if r['gmacs'] is None or r['gmacs'] <= gmacs]
    if not rows:
      raise ValueError(f'no policy {policy!r} within {gmacs} GMACs')
    self.policy = rows[-1]

    def session(name):
      return onnxruntime.InferenceSession(os.path.join(folder, f'{name}.onnx'))

    tried = [contract['programs'][j] for j in self.policy['path']]
    self._networks = [session(name) for name in tried]
    self._predictor = self.policy['start'] and session('predictor')

  def predict(self, source):
    """Classifies an image: a path or a PIL image."""
    contract, policy, image = self.contract, self.policy, self.read(source)
    path, said = policy['path'], []
    first = self._begin(image) if self._predictor else 0
    for i in range(first, len(path)):
      crop = cut(image, contract['views'][path[i]])
      said += self._networks[i].run(None, {'images': crop[None]})[0][:1]
      p = sum(said) / len(said) if policy['answer'] == 'pooled' else said[-1]
      low, high = np.sort(p)[-2:]
      sure = high - low if policy['signal'] == 'margin' else high
      if i == len(path) - 1 or sure >= policy['stop'][i]:
        break
    label, ran = int(p.argmax()), path[first : i + 1]
    answer = {'label': label, 'probability': float(p[label])}
    answer['name'] = contract['class_names'][label]
    answer['ran'] = [contract['options']['names'][j] for j in ran]
    answer['gmacs'] = sum(contract['gmacs'][j] for j in ran)
    answer['gmacs'] += contract['predictor_gmacs'] if self._predictor else 0
    return answer | {'probabilities': p}

  def _begin(self, image):
    """The position in the path at which an image starts."""
    dial = self.policy['start']
    view = cut(image, self.contract['predictor_view'])
    (log_p,) = self._predictor.run(None, {'images': view[None]})[0]
    known = [self.contract['routes'].index(j) for j in self.policy['path']]
    mixed = zlib.crc32(view) / 2**32 < dial['share']
    penalty = dial['high' if mixed else 'low'] * np.asarray(dial['costs'])
    return int((log_p[known].astype(np.float64) - penalty).argmax())

  def read(self, source):
    """A PIL image, or the file at a path, as 8-bit RGB, the right way up."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    if self.contract['decode'] == 'scaled' and image is not source:
      least = max(view['short_px'] for view in self.contract['views'])
      image.draft(None, (2 * least,) * 2)  # JPEGs, with margin
    image = ImageOps.exif_transpose(image)
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
      grey = np.asarray(image, np.float32) / (1 if image.mode == 'F' else 257)
      image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
      image = image.convert('RGBA')
      white = Image.new('RGBA', image.size, 'white')
      image = Image.alpha_composite(white, image)
    return image.convert('RGB')


def cut(image, view):
  """The image as a network is given it, uint8 [side_px, side_px, 3]."""
  short, side = view['short_px'], view['side_px']
  size, scale = (short, short), short / min(image.size)
  if view['keep_aspect']:
    size = tuple(max(round(x * scale), short) for x in image.size)
  if image.size != size:
    image = image.resize(size, Image.Resampling.BILINEAR)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  return np.asarray(image.crop((left, top, left + side, top + side)))


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--policy', default='usual')
  parser.add_argument('--gmacs', type=float)
  parser.add_argument('images', nargs='+')
  flags = parser.parse_args()
  model = Model(HERE, policy=flags.policy, gmacs=flags.gmacs)
  for name in flags.images:
    answer = model.predict(name)
    del answer['probabilities']
    print(json.dumps({'image': name, **answer}))
