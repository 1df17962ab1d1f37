# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model with onnxruntime, numpy and Pillow; no JAX.

python run.py [--policy=best --gmacs=2.0] photo.jpg more.png
"""

import argparse
import json
import os
import sys
import zlib

import numpy as np

if __package__ == 'drnet_jax.export':
  from drnet_jax.data import pixels, transforms
elif __package__:  # an export that is part of a program
  from . import pixels, transforms
else:  # beside it, in an export
  import pixels
  import transforms


class Model:
  """An export, run by the best policy of a family for an average of gmacs."""

  def __init__(self, folder, *, policy=None, gmacs=np.inf):
    kept = gmacs == np.inf  # what keeps the accuracy, without a budget
    policy = policy or ('usual' if kept else 'best')
    with open(os.path.join(folder, 'contract.json')) as file:
      self.contract = contract = json.load(file)
    rows = [row for row in contract['policies'] if row['kept'] == kept]
    if not (named := [row for row in rows if row['family'] == policy]):
      known = ', '.join(sorted({row['family'] for row in rows}))
      raise ValueError(f'there is no policy {policy!r}; there are {known}')
    if not kept and gmacs < (least := named[0]['gmacs']):
      raise ValueError(f'the least of {policy!r} is {least:.4g} GMACs')
    self.policy = [row for row in named if kept or row['gmacs'] <= gmacs][-1]
    os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')  # else it reports home
    import onnxruntime

    names = [contract['programs'][j] for j in self.policy['path']]
    names += ['predictor'] if self.policy['start'] else []
    paths = [os.path.join(folder, f'{name}.onnx') for name in names]
    self._sessions = [onnxruntime.InferenceSession(path) for path in paths]

  def predict(self, source):
    """Classifies an image: a path, bytes, a PIL image or an array."""
    contract, policy, image = self.contract, self.policy, self.read(source)
    path, said = policy['path'], []
    first = self._begin(image) if policy['start'] else 0
    for i in range(first, len(path)):
      crop = cut(image, contract['views'][path[i]])
      said.append(self._sessions[i].run(None, {'images': crop[None]})[0][0])
      p = sum(said) / len(said) if policy['answer'] == 'pooled' else said[-1]
      low, high = np.sort(np.append(p, np.float32(0)))[-2:]  # 0: of one class
      sure = high - low if policy['signal'] == 'margin' else high
      if i == len(path) - 1 or sure >= policy['stop'][i]:
        break
    label, ran = int(p.argmax()), path[first : i + 1]
    asked = contract['predictor_gmacs'] if policy['start'] else 0
    answer = {'label': label, 'name': contract['class_names'][label]}
    answer |= {'probability': float(p[label]), 'probabilities': p}
    answer['ran'] = [contract['options']['names'][j] for j in ran]
    return answer | {'gmacs': sum(contract['gmacs'][j] for j in ran) + asked}

  def _begin(self, image):
    """The position in the path at which an image starts."""
    dial = self.policy['start']
    crop = cut(image, self.contract['predictor_view'])
    (log_p,) = self._sessions[-1].run(None, {'images': crop[None]})[0]
    known = [self.contract['routes'].index(j) for j in self.policy['path']]
    mixed = zlib.crc32(crop) / 2**32 < dial['share']
    penalty = dial['high' if mixed else 'low'] * np.asarray(dial['costs'])
    return int((log_p[known].astype(np.float64) - penalty).argmax())

  def read(self, source):
    """Anything that `pixels.decode` reads as uint8 [H, W, 3]."""
    short_px = max(view['short_px'] for view in self.contract['views'])
    scaled = self.contract['decode'] == 'scaled'
    least_px = transforms.DECODE_MARGIN * short_px if scaled else None
    return pixels.decode(source, least_px=least_px)


def cut(image, view):
  """The image as a network is given it, uint8 [side_px, side_px, 3]."""
  how = {'resize_px': view['short_px'], 'keep_aspect': view['keep_aspect']}
  return transforms.center_crop(image, view['side_px'], **how).copy()


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--policy', help='best, cascade, fixed, router, ...')
  parser.add_argument(
    '--gmacs', type=float, default=np.inf, help='most for an image, on average'
  )
  parser.add_argument('images', nargs='+')
  flags, failed = parser.parse_args(), 0
  here = os.path.dirname(os.path.abspath(__file__))
  try:
    model = Model(here, policy=flags.policy, gmacs=flags.gmacs)
  except ValueError as error:
    parser.error(str(error))
  for name in flags.images:
    try:
      answer = {'image': name, **model.predict(name)}
      print(json.dumps({k: answer[k] for k in answer if k != 'probabilities'}))
    except pixels.UnreadableImage as error:
      print(f'error: {error}', file=sys.stderr)
      failed = 2
  sys.exit(failed)
