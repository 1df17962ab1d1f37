# SPDX-License-Identifier: Apache-2.0
"""Which images of a split are shown, and small copies of them.

They are copied at the evaluation, so that a report needs no data set.
"""

import base64
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from drnet_jax.choosing import scores
from drnet_jax.choosing.record import Record
from drnet_jax.run import workdir

COLUMNS = 10
_SIDE_PX = 128
_FOLDER = workdir.PICTURES


def shown(
  record: Record, ends: np.ndarray | None
) -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
  """Two groupings of the images, and in which order to show these.

  Args:
    record: of a split.
    ends: int [N], the option at which each image ends; None if nothing chooses.

  Returns:
    By name the group of each image, int [N], and for each group the indices of
    its images, at random with a fixed seed: the first COLUMNS of those at hand
    are to be shown. 'ends': by `ends` (Figure 4 of the paper). 'needed': by the
    cheapest option that is right, the last group by none (Figure 1).
  """
  groups = {} if ends is None else {'ends': ends}
  groups['needed'] = scores.smallest_sufficient(record)
  found = {}
  for name, group in groups.items():
    rng = np.random.default_rng(0)
    images = [
      np.flatnonzero(group == k) for k in range(len(record.options) + 1)
    ]
    found[name] = group, [rng.permutation(i) for i in images]
  return found


def path(i: int) -> str:
  """Where the copy of an image lies in the folder of the report."""
  return f'{_FOLDER}/{i}.jpg'


def save(
  record: Record,
  ends: np.ndarray | None,
  read_image: Callable[[int], np.ndarray],
  directory: str,
) -> None:
  """Leaves small copies of the images to show in `<directory>/pictures/`.

  Args:
    record: of a split.
    ends: as for `shown`.
    read_image: from an index of the record to uint8 [H, W, 3].
    directory: of the report.
  """
  drawn = [
    i[:COLUMNS] for _, rows in shown(record, ends).values() for i in rows
  ]
  folder = os.path.join(directory, _FOLDER)
  os.makedirs(folder, exist_ok=True)
  for name in os.listdir(folder):
    os.remove(os.path.join(folder, name))  # of an earlier evaluation
  for i in np.unique(np.concatenate(drawn)):
    image = Image.fromarray(read_image(i))
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    image.save(os.path.join(directory, path(i)), quality=90)


def load(directory: str) -> dict[int, str]:
  """What `save` left, as `data:` addresses by index; {} if it left none."""
  return {
    int(file.stem): 'data:image/jpeg;base64,'
    + base64.b64encode(file.read_bytes()).decode()
    for file in pathlib.Path(directory, _FOLDER).glob('*.jpg')
    if file.stem.isdecimal()
  }
