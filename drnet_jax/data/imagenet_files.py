# SPDX-License-Identifier: Apache-2.0
"""The images of ImageNet where they lie: in the official tars, or in folders.

Nothing is unpacked: an image in a tar is a place in that file.
"""

import dataclasses
import os
import re
import tarfile
from collections.abc import Sequence

import tensorflow_datasets as tfds
from tqdm import tqdm

from drnet_jax.data import folder
from drnet_jax.errors import UserError

TRAIN_TAR, VAL_TAR = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
  """An encoded image within a file.

  Attributes:
    name: of the image, for instance 'n01440764_18.JPEG'.
    wnid: its class, for instance 'n01440764'.
    path: of the file it lies in.
    offset: where it begins there, in bytes.
    size: in bytes.
  """

  name: str
  wnid: str
  path: str
  offset: int
  size: int

  def read(self) -> bytes:
    with open(self.path, 'rb', buffering=0) as file:
      data = os.pread(file.fileno(), self.size, self.offset)
    if len(data) != self.size:
      raise UserError(f'{self.path} ends within {self.name}: it is incomplete')
    return data


def find(root: str, kept: Sequence[str]) -> dict[str, list[Image]]:
  """Finds the images of splits 'train' and 'validation', sorted by name.

  Args:
    root: a folder with the two official tars, or with train/<wnid>/ and
      val/<wnid>/.
    kept: the classes to find; none for all.

  Raises:
    UserError: there is neither, or a tar is damaged.
  """
  tars = [os.path.join(root, name) for name in (TRAIN_TAR, VAL_TAR)]
  if all(map(os.path.exists, tars)):
    try:
      train = _in_train_tar(tars[0], kept)
      validation = _in_validation_tar(tars[1], kept)
    except (tarfile.TarError, OSError) as error:
      raise UserError(f'cannot read the tars in {root}: {error}') from error
  elif os.path.isdir(os.path.join(root, 'train')):
    train = _in_folder(root, 'train', kept)
    validation = _in_folder(root, 'val', kept)
  else:
    raise UserError(
      f'{root} holds neither {TRAIN_TAR} and {VAL_TAR} nor folders '
      'train/<class>/ and val/<class>/'
    )
  return {
    'train': sorted(train, key=lambda image: image.name),
    'validation': sorted(validation, key=lambda image: image.name),
  }


def _in_train_tar(path: str, kept: Sequence[str]) -> list[Image]:
  """Of a tar of tars, one to a class."""
  found = []
  with tarfile.open(path, 'r:') as outer, open(path, 'rb') as file:
    for member in tqdm(outer, desc='find', unit='class', disable=None):
      wnid = os.path.basename(member.name).removesuffix('.tar')
      if kept and wnid not in kept:
        continue
      file.seek(member.offset_data)
      with tarfile.open(fileobj=file, mode='r:') as inner:
        found += [_image(m, wnid, path) for m in inner if m.isfile()]
  return found


def _in_validation_tar(path: str, kept: Sequence[str]) -> list[Image]:
  """Of one tar; the class follows from the number in the name."""
  of_number = tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt')
  wnids = of_number.read_text().split()
  found = []
  with tarfile.open(path, 'r:') as tar:
    for member in tar:
      if not member.isfile():
        continue
      number = re.search(r'ILSVRC2012_val_(\d{8})\.', member.name)
      if not number or not 1 <= int(number[1]) <= len(wnids):
        raise UserError(f'{path} holds {member.name}, no validation image')
      wnid = wnids[int(number[1]) - 1]
      if not kept or wnid in kept:
        found.append(_image(member, wnid, path))
  return found


def _image(member: tarfile.TarInfo, wnid: str, path: str) -> Image:
  name = os.path.basename(member.name)
  return Image(name, wnid, path, member.offset_data, member.size)


def _in_folder(root: str, split: str, kept: Sequence[str]) -> list[Image]:
  files, names = folder.load(root, split, kept, images_per_class=0)
  return [
    Image(os.path.basename(path), names[label], path, 0, os.path.getsize(path))
    for path, label in zip(files.paths, files.labels, strict=True)
  ]
