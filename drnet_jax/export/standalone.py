# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model with onnxruntime, numpy and Pillow; no JAX.

    python run.py [--policy=best --gmacs=2.0] photo.jpg more.png

This file and the two that it imports, pixels.py and transforms.py, are copied
into every export and need nothing else of drnet_jax.
"""

import argparse
import json
import os
import sys
import zlib

import numpy as np
import onnxruntime

if __package__:
  from drnet_jax.data import pixels, transforms
else:  # beside it, in an export
  import pixels
  import transforms

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
    """Classifies an image: a path, bytes, a PIL image or an array."""
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
    """Anything that `pixels.decode` reads as uint8 [H, W, 3]."""
    least_px = None
    if self.contract['decode'] == 'scaled':
      short_px = max(view['short_px'] for view in self.contract['views'])
      least_px = transforms.DECODE_MARGIN * short_px
    return pixels.decode(source, least_px=least_px)


def cut(image, view):
  """The image as a network is given it, uint8 [side_px, side_px, 3]."""
  options = {'resize_px': view['short_px'], 'keep_aspect': view['keep_aspect']}
  crop = transforms.center_crop(image, view['side_px'], **options)
  return np.ascontiguousarray(crop)


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--policy', default='usual')
  parser.add_argument('--gmacs', type=float)
  parser.add_argument('images', nargs='+')
  flags = parser.parse_args()
  failed = False
  try:
    model = Model(HERE, policy=flags.policy, gmacs=flags.gmacs)
    for name in flags.images:
      try:
        answer = model.predict(name)
        del answer['probabilities']
        print(json.dumps({'image': name, **answer}))
      except pixels.UnreadableImage as error:
        failed = True
        print(f'error: {error}', file=sys.stderr)
  except ValueError as error:
    sys.exit(f'error: {error}')
  sys.exit(2 * failed)
