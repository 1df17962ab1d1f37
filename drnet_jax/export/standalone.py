# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model with onnxruntime, numpy and Pillow; no JAX.

    python run.py [--gmacs=2.0] photo.jpg more.png

This file needs nothing else of drnet_jax and is copied into every export.
"""

import argparse
import json
import os

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Model:
  """An exported model.

  Args:
    folder: of the export.
    gmacs: average cost to stay under (see the table in contract.json); None
      for the choice as trained.
  """

  def __init__(self, folder, *, gmacs=None):
    with open(os.path.join(folder, 'contract.json')) as file:
      self.contract = contract = json.load(file)
    self._penalty = np.zeros(len(contract['resolutions']))
    if gmacs is not None:
      rows = [row for row in contract['budgets'] if row['gmacs'] <= gmacs]
      if not rows:
        raise ValueError(f'no entry of the budget table is within {gmacs}')
      self._penalty = rows[-1]['lambda'] * np.asarray(contract['gmacs'])

    def session(name):
      return onnxruntime.InferenceSession(os.path.join(folder, f'{name}.onnx'))

    self._networks = [session(f'r{px}') for px in contract['resolutions']]
    self._predictor = session('predictor') if contract['predictor_px'] else None

  def predict(self, source):
    """Classifies an image: a path or a PIL image."""
    contract, scaled = self.contract, self.contract['decode'] == 'scaled'
    j, crop = len(self._networks) - 1, None
    if self._predictor:
      px = contract['predictor_px' if scaled else 'image_px']
      crop = self.crop(source, px)
      (log_p,) = self._predictor.run(None, {'images': crop[None]})
      j = int((log_p[0].astype(np.float64) - self._penalty).argmax())
    px = contract['resolutions'][j] if scaled else contract['image_px']
    if crop is None or len(crop) != px:
      crop = self.crop(source, px)
    ((p,),) = self._networks[j].run(None, {'images': crop[None]})
    label = int(p.argmax())
    answer = {'label': label, 'probability': float(p[label])}
    answer['name'] = contract['class_names'][label]
    answer['size_px'] = contract['resolutions'][j]
    answer['gmacs'] = contract['gmacs'][j] + contract['predictor_gmacs']
    return answer | {'probabilities': p}

  def crop(self, source, px):
    """The image as a network is given it, uint8 [px, px, 3]."""
    contract = self.contract
    ratio = contract['resize_px'] / contract['image_px']
    short_px = max(round(px * ratio), px)
    image = source if isinstance(source, Image.Image) else Image.open(source)
    if contract['decode'] == 'scaled' and image is not source:
      image.draft(None, (2 * contract['resize_px'],) * 2)  # JPEGs, with margin
    image = ImageOps.exif_transpose(image)
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
      grey = np.asarray(image, np.float32) / (1 if image.mode == 'F' else 257)
      image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
      image = image.convert('RGBA')
      white = Image.new('RGBA', image.size, 'white')
      image = Image.alpha_composite(white, image)
    image = image.convert('RGB')
    size, scale = (short_px, short_px), short_px / min(image.size)
    if contract['keep_aspect']:
      size = tuple(max(round(side * scale), short_px) for side in image.size)
    if image.size != size:
      image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - px) // 2, (image.height - px) // 2
    return np.asarray(image.crop((left, top, left + px, top + px)))


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--gmacs', type=float)
  parser.add_argument('images', nargs='+')
  arguments = parser.parse_args()
  here = os.path.dirname(os.path.abspath(__file__))
  model = Model(here, gmacs=arguments.gmacs)
  for path in arguments.images:
    answer = model.predict(path)
    del answer['probabilities']
    print(json.dumps({'image': path, **answer}))
