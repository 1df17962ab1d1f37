# SPDX-License-Identifier: Apache-2.0
"""Times training input; the command `benchmark_input` tells what and how."""

import contextlib
import dataclasses
import functools
import glob
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from drnet_jax import terminal
from drnet_jax.data import packed, random_crop, shard_writer, sources
from drnet_jax.data.pipeline import Data
from drnet_jax.data.shard_writer import Shard, serializer
from drnet_jax.data.shards import Shards

_DECODED = 500  # images for the table of decoders
_WARM_UP = 8  # batches, until what was made ahead is used up

Now = Callable[[], float]
Row = dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
  """What is measured: see the flags of the command."""

  packed: str
  split: str
  images: int
  size_px: int
  batch_size: int
  turns: int
  threads: tuple[int, ...]
  workers: tuple[int, ...]
  memory_images: int


def run(asked: Input) -> None:
  """Prints the tables."""
  files = _files(asked)
  terminal.say(
    f'{len(files)} images of {np.mean([len(f) for f in files]) / 1e3:.0f} kB, '
    f'crops of {asked.size_px} px, {os.cpu_count()} cores\n'
  )
  terminal.say(terminal.table(_decoders(asked, files[:_DECODED])))
  with tempfile.TemporaryDirectory() as root:
    for kind, write in (('folder', _as_folder), ('ArrayRecord', _as_shards)):
      data = write(files, os.path.join(root, kind))
      terminal.say('\n' + terminal.table(_pipelines(asked, kind, data)))
    if asked.memory_images:
      for workers in (0, 2):
        terminal.say('\n' + _memory(asked, data, workers))


def _files(asked: Input) -> list[bytes]:
  examples, _ = packed.load(asked.packed, asked.split, (), 0)
  rows = np.random.default_rng(0).permutation(len(examples))[: asked.images]
  return [examples[i]['image'] for i in rows]


def _as_folder(files: list[bytes], root: str) -> Data:
  folder = os.path.join(root, 'train', 'all')
  os.makedirs(folder)
  for i, file in enumerate(files):
    with open(os.path.join(folder, f'{i:06d}.jpg'), 'wb') as out:
      out.write(file)
  return _data('folder', root)


def _as_shards(files: list[bytes], root: str) -> Data:
  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(num_classes=1),
    }
  )
  serialize = serializer(features)

  def records() -> Iterator[bytes]:
    return (serialize({'image': file, 'label': 0}) for file in files)

  directory = os.path.join(root, 'photographs', '1.0.0')
  splits = {'train': [Shard(len(files), records)]}
  shard_writer.write(directory, {}, splits, features, threads=1)
  return _data('photographs', root)


def _data(name: str, data_dir: str) -> Data:
  return Data(
    name=name,
    data_dir=data_dir,
    train_split='train',
    validation_split='train',
    test_split='train',
    epoch_images=0,
    least_epoch_images=0,
    augmentation='random_resized_crop',
    least_crop=0.08,
    flip=0.0,
    mixup=0.0,
    cutmix=0.0,
    rand_augment=(),
    resize_px=0,
    keep_aspect=True,
    classes='',
    class_map='',
    unlabelled='',
    images_per_class=0,
    held_out=0,
    max_bad_images=0,
    max_pixels=0,
    keys=('image', 'label'),
    threads=1,
    workers=0,
  )


def _in_turns(contenders: dict[Any, Callable[[], float]], turns: int):
  """Measures functions that return images a second in turn.

  Yields:
    Name, median rate, and median of the ratios to the first's.
  """
  rates = {name: [] for name in contenders}
  for _ in range(turns):
    for name, run in contenders.items():
      rates[name].append(run())
  first = next(iter(rates.values()))
  for name, values in rates.items():
    ratios = [a / b for a, b in zip(values, first, strict=True)]
    yield name, statistics.median(values), statistics.median(ratios)


def _decoders(asked: Input, files: list[bytes]) -> list[Row]:
  decoders = {'Pillow': random_crop.with_pillow}
  enlargers = {'Pillow': None}
  if random_crop.optional('simplejpeg'):
    decoders['turbo'] = random_crop.with_turbo
  if random_crop.optional('cv2'):
    decoders['OpenCV'] = _decode_with_opencv
    enlargers['OpenCV'] = random_crop.with_opencv
  contenders = {
    (decoder, enlarger): functools.partial(
      _crop_all, asked, files, random_crop.Codec(decode, enlarge)
    )
    for decoder, decode in decoders.items()
    for enlarger, enlarge in enlargers.items()
  }
  return [
    {
      'decoded by': decoder,
      'enlarged by': enlarger,
      'images/s of a core': f'{rate:.0f}',
      'x Pillow': f'{ratio:.2f}',
    }
    for (decoder, enlarger), rate, ratio in _in_turns(contenders, asked.turns)
  ]


def _decode_with_opencv(image: Image.Image, shrink: int) -> np.ndarray:
  """To compare with; not to train with, for it makes cut-off files grey."""
  cv2 = random_crop.optional('cv2')
  # Smaller ones come with blue first; it takes as long.
  mode = f'REDUCED_COLOR_{shrink}' if shrink > 1 else 'COLOR_RGB'
  image.fp.seek(0)
  data = np.frombuffer(image.fp.read(), np.uint8)
  return cv2.imdecode(data, getattr(cv2, f'IMREAD_{mode}'))


def _crop_all(
  asked: Input, files: list[bytes], codec: random_crop.Codec
) -> float:
  rng = np.random.default_rng(0)
  start = time.process_time()
  for file in files:
    random_crop.random_resized_crop(file, asked.size_px, rng, codec)
  return len(files) / (time.process_time() - start)


def _pipelines(asked: Input, kind: str, data: Data) -> list[Row]:
  threads = {
    f'{n} threads': dataclasses.replace(data, threads=n) for n in asked.threads
  }
  workers = {
    f'{n} workers': dataclasses.replace(data, workers=n) for n in asked.workers
  }
  source, rows = data.open('train'), []
  if isinstance(source.examples, Shards):
    source.examples.keep_nothing()
  measured = [('core', time.process_time, threads)]
  if workers:  # whose processors' time is not counted as ours
    measured.append(('clock', time.perf_counter, threads | workers))
  for per, now, settings in measured:
    contenders = {
      'bare loop': functools.partial(_bare_loop, asked, source.examples, now)
    }
    for name, changed in settings.items():
      contenders[name] = functools.partial(_whole, asked, changed, source, now)
    rows += [
      {
        'input': f'{kind}, {name}',
        'images/s': f'{rate:.0f}',
        'of a': per,
        'x bare loop': f'{ratio:.2f}',
      }
      for name, rate, ratio in _in_turns(contenders, asked.turns)
    ]
  return rows


def _bare_loop(asked: Input, examples: sources.Examples, now: Now) -> float:
  rng = np.random.default_rng(0)
  start = now()
  for i in rng.permutation(len(examples)):
    image = examples[i]['image']
    random_crop.random_resized_crop(image, asked.size_px, rng)
  return len(examples) / (now() - start)


def _whole(asked: Input, data: Data, source: sources.Source, now: Now) -> float:
  """Images a second of the running pipeline."""
  count = max(asked.images // asked.batch_size, 1)
  with _stream(asked, data, source) as stream:
    _take(stream, _WARM_UP)
    start = now()
    _take(stream, count)
    return count * asked.batch_size / (now() - start)


def _stream(asked: Input, data: Data, source: sources.Source):
  return contextlib.closing(
    data.train_batches(
      source,
      size_px=asked.size_px,
      batch_size=asked.batch_size,
      seed=0,
      start_step=0,
    )
  )


def _take(stream: Iterator, count: int) -> None:
  for _ in itertools.islice(stream, count):
    pass


def _peak_mib(*, of_children: bool) -> float:
  """Resident memory so far, of this process or of the largest of its children.

  Of Linux alone. What `resource` says of children began with their parent's.
  """
  found, mine = [0.0], str(os.getpid())
  for path in glob.glob('/proc/[0-9]*/status'):
    with contextlib.suppress(OSError), open(path) as file:
      fields = dict(line.split(':\t', 1) for line in file if ':\t' in line)
      who = fields['PPid' if of_children else 'Pid'].strip()
      if who == mine and 'VmHWM' in fields:
        found.append(int(fields['VmHWM'].split()[0]) / 1024)
  return max(found)


def _memory(asked: Input, data: Data, workers: int) -> str:
  """Peaks of the process that makes the batches."""
  source, peaks = data.open('train'), []
  changed = dataclasses.replace(data, threads=2, workers=workers)
  for share in (0.1, 1):
    with _stream(asked, changed, source) as stream:
      _take(stream, round(share * asked.memory_images / asked.batch_size))
      peaks.append(_peak_mib(of_children=bool(workers)))
  batch_mb = asked.batch_size * 3 * asked.size_px**2 / 1e6
  maker = f'each of {workers} workers' if workers else 'this process'
  return (
    f'Peak memory of {maker}, 2 threads, batches of {batch_mb:.0f} MB: '
    f'{peaks[0]:.0f} MiB after a tenth of {asked.memory_images} images, '
    f'{peaks[1]:.0f} MiB after all'
  )
