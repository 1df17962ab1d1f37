# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model with onnxruntime, numpy and Pillow; no JAX.

    python run.py [--gmacs=2.0] photo.jpg more.png

This file needs nothing else of drnet_jax and is copied into every export.
"""

import argparse
import io
import json
import math
import os
import sys

import numpy as np
import onnxruntime
from PIL import Image, JpegImagePlugin, PngImagePlugin

MAX_PIXELS = int(os.environ.get('DRNET_JAX_MAX_PIXELS') or 2**30 // 12)
Image.MAX_IMAGE_PIXELS = max(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or 0)
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's in Pillow's words
# Of integers of 16 and more bits, and of floats: white, and a factor to 8 bits.
GREY = {'u': (65535, 1 / 256), 'i': (255, 1), 'f': (1, 255)}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long prompts


def read(source, least_px=math.inf):
  """A path, bytes, a PIL image or an array as RGB, the right way up.

  Raises ValueError, whatever a decoder says.
  """
  try:
    return as_rgb(source, least_px)
  except Exception as error:
    name = source if isinstance(source, (str, os.PathLike)) else 'the image'
    raise ValueError(f'cannot read {name} as an image: {error}') from error


def as_rgb(source, least_px):
  if isinstance(source, (str, os.PathLike)):
    with open(source, 'rb') as file:
      source = file.read()
  if isinstance(source, bytes):
    is_jpeg, file = source.startswith(b'\xff\xd8\xff'), io.BytesIO(source)
    source = (JpegImagePlugin.JpegImageFile if is_jpeg else Image.open)(file)
    (w, h), part = source.size, 1  # a JPEG is decoded at 1/2, 1/4, 1/8 of it
    most = math.inf if 'progressive' in source.info else MAX_PIXELS
    while (is_jpeg and part < 8) and (
      min(w, h) >= 2 * part * least_px or w * h > part**2 * most
    ):
      part *= 2
    if w * h > MAX_PIXELS * (part**2 if most < math.inf else 1):
      raise ValueError(f'{w} x {h} pixels, more than DRNET_JAX_MAX_PIXELS')
    source.draft(None, (w // part, h // part))
  elif not isinstance(source, Image.Image):
    source = Image.fromarray(np.asarray(source))
  source.load()
  turn = TURNS.get(orientation(source))
  image = source if turn is None else source.transpose(turn)
  if image.mode[0] in 'IF':
    is_deep = image.mode == 'I' and source.format == 'PPM'
    x = np.array(image, np.uint16 if is_deep else None)
    white, factor = GREY[x.dtype.kind]
    if not 0 <= x.min() <= x.max() <= white:
      raise ValueError(f'pixels should lie within 0 and {white}')
    x[x == image.info.get('transparency')] = white
    image = Image.fromarray((x * factor + (factor > 1) / 2).astype(np.uint8))
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image if image.mode == 'RGB' else image.convert('RGB')


def orientation(image):
  """EXIF's, 1 to 8, whatever else in there is damaged."""
  exif = image.info.get('exif')
  if not isinstance(exif, bytes):
    return getattr(image, 'tag_v2', {}).get(0x0112, 1)
  start = max(exif.find(b'II*\0'), exif.find(b'MM\0*'))
  order = 'little' if exif[start : start + 1] == b'I' else 'big'

  def number(place, size=2):
    return int.from_bytes(exif[place : place + size], order)

  first = start + number(start + 4, 4)
  for tag in range(first + 2, first + 2 + 12 * number(first), 12):
    if start >= 0 and number(tag) == 0x0112:
      return number(tag + 8, 4 if number(tag + 2) == 4 else 2)
  return 1


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
    least_px = 2 * contract['resize_px']  # of a JPEG: a margin for the resize
    scaled = contract['decode'] == 'scaled'
    image = read(source, least_px if scaled else math.inf)
    size, scale = (short_px, short_px), short_px / min(image.size)
    if contract['keep_aspect']:
      x, y = (max(side - 8 * min(image.size), 0) // 2 for side in image.size)
      image = image.crop((x, y, image.width - x, image.height - y))
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
  status = 0
  for path in arguments.images:
    try:
      answer = model.predict(path)
    except ValueError as error:
      print(f'error: {error}', file=sys.stderr)
      status = 2
      continue
    del answer['probabilities']
    print(json.dumps({'image': path, **answer}))
  sys.exit(status)
