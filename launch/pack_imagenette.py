# SPDX-License-Identifier: Apache-2.0
"""Makes a smaller packed file of a packed file: for slow ways to a machine.

python launch/pack_imagenette.py imagenette2_224.npz imagenette_160.npz

Images are resized to a square of --px and encoded anew, as baseline JPEGs, that
decode in half the time of progressive ones. If the file would be larger than
--mib, of each split and class the last images are left out, the same share of
each. See drnet_jax/data/packed.py for the format.
"""

import argparse
import io

import numpy as np
from PIL import Image


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('source')
  parser.add_argument('target')
  parser.add_argument('--px', type=int, default=160)
  parser.add_argument('--quality', type=int, default=80)
  parser.add_argument('--mib', type=float, default=50)
  asked = parser.parse_args()
  if asked.mib <= 0.25:
    parser.error('--mib must be above .25, which other arrays take')
  with np.load(asked.source) as opened:
    file = dict(opened)
  split = file.get('split', np.ones_like(file['label']))
  images = [
    encoded(file['data'][start:end].tobytes(), asked.px, asked.quality)
    for start, end in zip(
      file['offsets'][:-1], file['offsets'][1:], strict=True
    )
  ]
  kept = fitting(
    np.array([len(image) for image in images]),
    split * (1 + file['label'].max()) + file['label'],
    asked.mib * 2**20 - 2**18,  # the other arrays
  )
  chosen = [images[i] for i in kept]
  np.savez(
    asked.target,
    data=np.frombuffer(b''.join(chosen), np.uint8),
    offsets=np.cumsum([0, *map(len, chosen)]),
    label=file['label'][kept],
    split=split[kept],
    class_name=file['class_name'],
  )
  print(f'{len(kept)} of {len(images)} images, {sum(map(len, chosen))} bytes')


def encoded(jpeg: bytes, px: int, quality: int) -> bytes:
  """The same picture as a baseline JPEG of px x px."""
  with Image.open(io.BytesIO(jpeg)) as image:
    small = image.convert('RGB').resize((px, px), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  small.save(buffer, 'JPEG', quality=quality)
  return buffer.getvalue()


def fitting(sizes: np.ndarray, groups: np.ndarray, most: float) -> np.ndarray:
  """Which images to keep.

  Args:
    sizes: bytes of each.
    groups: split and class of each, as one number.
    most: bytes of all that are kept.
  """
  share = min(1.0, most / sizes.sum())
  while True:
    kept = np.sort(
      np.concatenate(
        [
          members[: int(share * len(members))]
          for group in np.unique(groups)
          for members in [np.flatnonzero(groups == group)]
        ]
      )
    )
    if sizes[kept].sum() <= most:
      return kept
    share *= 0.99


if __name__ == '__main__':
  main()
