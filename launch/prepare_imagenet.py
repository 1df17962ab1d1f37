# SPDX-License-Identifier: Apache-2.0
"""ImageNet as ArrayRecord, from the official tars, folders or TFRecord.

python launch/prepare_imagenet.py --source=/downloads --data_dir=/data

where /downloads holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or
train/<wnid>/*.JPEG and val/<wnid>/*.JPEG. It becomes TFDS's imagenet2012:

python -m drnet_jax.main --config=configs/in1k.py --workdir=runs/in1k
--config.data.data_dir=/data

--classes=imagenet100 keeps our hundred classes, as a data set of that name;
--from_tfrecord=/old/imagenet2012/5.1.0 converts what TFDS prepared before, of
any data set. TensorFlow is not needed. Killed at any time, the same command
goes on; `sha256sum -c SHA256SUMS` in the data set's folder checks it.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import math
import os
import re
import sys
import tarfile
from collections.abc import Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from drnet_jax.commands import cli
from drnet_jax.data import folder, selection, shard_writer, sources
from drnet_jax.data.shard_writer import SUMS, Shard
from drnet_jax.errors import UserError

_TRAIN_TAR, _VAL_TAR = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
# Images of the full data set, and the version TFDS gives it.
_COMPLETE = {'train': 1_281_167, 'validation': 50_000}
_VERSION = '5.1.0'


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
  """An encoded image where it lies: in a file of its own, or in a tar."""

  name: str  # for instance 'n01440764_18.JPEG'
  wnid: str  # its class, for instance 'n01440764'
  path: str  # of the file it lies in
  offset: int  # where it begins there, in bytes
  size: int  # in bytes

  def read(self) -> bytes:
    with open(self.path, 'rb', buffering=0) as file:
      data = os.pread(file.fileno(), self.size, self.offset)
    if len(data) != self.size:
      raise UserError(f'{self.path} ends within {self.name}: it is incomplete')
    return data


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--source', help='folder of the tars, or of train/, val/')
  parser.add_argument('--from_tfrecord', help="folder of TFDS's TFRecord files")
  parser.add_argument('--data_dir', required=True, help='where to write to')
  parser.add_argument('--classes', default='', help='imagenet100, or a file')
  parser.add_argument(
    '--images_per_class', type=int, default=0, help='to train on; 0 for all'
  )
  parser.add_argument('--shard_mb', type=float, default=150, help='of a shard')
  parser.add_argument('--threads', type=int, default=8, help='shards at a time')
  options = parser.parse_args(arguments)
  if bool(options.source) == bool(options.from_tfrecord):
    parser.error('one of --source and --from_tfrecord is needed')
  if options.from_tfrecord and (options.classes or options.images_per_class):
    parser.error('--classes and --images_per_class are for --source')
  if options.shard_mb <= 0 or options.threads < 1:
    parser.error('--shard_mb and --threads must be above 0')
  if options.images_per_class < 0:
    parser.error('--images_per_class is a number of images, or 0 for all')
  if options.source:
    prepare(options)
  else:
    convert(options)


def prepare(options: argparse.Namespace) -> None:
  """From tars or folders."""
  kept = sources.read_classes(options.classes)
  name = 'imagenet2012'
  if kept:
    name = os.path.splitext(os.path.basename(options.classes))[0]
  names = kept or sources.class_names(name, 'train', data_dir='', classes='')
  splits = _find(options.source, kept)
  _check_classes(splits, names)
  splits['train'] = _some(splits['train'], names, options.images_per_class)

  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(names=names),
      'file_name': tfds.features.Text(),
    }
  )
  directory = os.path.join(options.data_dir, name, _VERSION)
  found = hashlib.sha256()
  for images in splits.values():
    for image in images:
      found.update(f'{image.name} {image.wnid} {image.size}\n'.encode())
  plan = {
    'images': found.hexdigest(),
    'classes': names,
    'shard_mb': options.shard_mb,
  }
  shards = {
    split: _shards(images, features, options.shard_mb * 1e6)
    for split, images in splits.items()
  }
  shard_writer.write(directory, plan, shards, features, options.threads)
  _report(directory, {k: len(v) for k, v in splits.items()})
  if not kept and not options.images_per_class:
    for split, count in _COMPLETE.items():
      if len(splits[split]) != count:
        print(f'warning: all of {split} are {count:,} images')


def convert(options: argparse.Namespace) -> None:
  """From TFRecord, shard by shard."""
  source = os.path.abspath(options.from_tfrecord)
  try:
    builder = tfds.builder_from_directory(source)
  except (tfds.core.DatasetNotFoundError, ValueError, OSError) as error:
    raise UserError(
      f'--from_tfrecord={source} holds no data set of TFDS (no '
      f'dataset_info.json that can be read): {error}'
    ) from error
  splits = builder.info.splits
  shards = {
    split: [
      Shard(
        part.examples_in_shard,
        functools.partial(_tfrecords, os.fspath(part.filename)),
      )
      for part in info.file_instructions
    ]
    for split, info in splits.items()
  }
  name, version = builder.info.name, str(builder.info.version)
  directory = os.path.join(options.data_dir, name, version)
  counts = {split: info.num_examples for split, info in splits.items()}
  lengths = {k: [shard.count for shard in v] for k, v in shards.items()}
  plan = {'source': source, 'shards': lengths}
  shard_writer.write(
    directory, plan, shards, builder.info.features, options.threads
  )
  _report(directory, counts)


def _find(root: str, kept: Sequence[str]) -> dict[str, list[Image]]:
  """The images of splits 'train' and 'validation', sorted by name.

  Args:
    root: a folder with the two official tars, or with train/<wnid>/ and
      val/<wnid>/.
    kept: the classes to find; none for all.

  Raises:
    UserError: there is neither, or a tar is damaged.
  """
  tars = [os.path.join(root, name) for name in (_TRAIN_TAR, _VAL_TAR)]
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
      f'{root} holds neither {_TRAIN_TAR} and {_VAL_TAR} nor folders '
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


def _tfrecords(path: str):
  try:
    yield from grain.experimental.TFRecordIterDataset(path)
  except ValueError:  # its message is the whole record
    raise UserError(f'{path} is cut off, or no TFRecord file') from None


def _shards(
  images: list[Image], features: tfds.features.FeaturesDict, size: float
) -> list[Shard]:
  """Shards of about a size in bytes, of images in a fixed random order.

  So a slice of a split, such as 'train[:1%]', holds images of all classes.
  """
  count = max(math.ceil(sum(image.size for image in images) / size), 1)
  order = np.random.default_rng(0).permutation(len(images))
  serialize = shard_writer.serializer(features)

  def records(rows):
    for row in rows:
      image = images[row]
      yield serialize(
        {'image': image.read(), 'label': image.wnid, 'file_name': image.name}
      )

  return [
    Shard(len(rows), functools.partial(records, rows))
    for rows in np.array_split(order, count)
  ]


def _check_classes(splits, names) -> None:
  for split, images in splits.items():
    of_class = collections.Counter(image.wnid for image in images)
    missing = [name for name in names if name not in of_class]
    unknown = sorted(set(of_class) - set(names))
    if missing or unknown:
      raise UserError(
        f'{split} has no image of {len(missing)} classes {missing[:5]}, and '
        f'images of {len(unknown)} unknown ones {unknown[:5]}; are all files '
        'there? For some classes only, name them with --classes'
      )


def _some(
  images: list[Image], names: Sequence[str], wanted: int
) -> list[Image]:
  """Those that `config.data.images_per_class` keeps of a folder."""
  of_class = collections.defaultdict(list)
  for image in images:
    of_class[image.wnid].append(image)
  return [
    of_class[name][i]
    for label, name in enumerate(names)
    for i in selection.drawn(len(of_class[name]), wanted, label)
  ]


def _report(directory: str, counts: dict[str, int]) -> None:
  with open(os.path.join(directory, SUMS), 'rb') as file:
    sums = file.read()
  for split, count in counts.items():
    print(f'{split}: {count:,} images')
  shards = len(sums.splitlines())
  print(f'{directory}: {shards} shards, checksums in {SUMS}')
  print(f'sha256 of {SUMS}: {hashlib.sha256(sums).hexdigest()}')


if __name__ == '__main__':
  sys.exit(cli.run_command(main))
