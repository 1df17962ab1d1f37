# SPDX-License-Identifier: Apache-2.0
"""How fast the training input is, and how much of it is decoding.

python -m drnet_jax benchmark_input --packed=images.npz

Tables, of images of a packed file (`data/packed.py`):

decoders   random resized crops, in memory, with Pillow, OpenCV or a turbo codec
           decoding, and Pillow or OpenCV enlarging
pipeline   training batches from a folder and from ArrayRecord, against a bare
           loop that reads, decodes and crops the same files in one thread
memory     (--memory_images) peak of the resident memory after a tenth of the
           images and after all of them

Everything is measured in turns within one run; reported are the median rate and
the median of the turns' ratios. 'core' is a second of this process's time on a
processor, 'clock' a second that passes.
"""

from collections.abc import Sequence

from absl import flags

from drnet_jax.errors import UserError

_PACKED = flags.DEFINE_string('packed', None, 'Packed file.')
_SPLIT = flags.DEFINE_string('split', 'train', 'Split of the packed file.')
_IMAGES = flags.DEFINE_integer('images', 1000, 'Number of images.', 1)
_SIZE_PX = flags.DEFINE_integer('size_px', 224, 'Side of the crops.', 1)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 64, 'Images of a batch.', 1)
_TURNS = flags.DEFINE_integer('turns', 5, 'Repetitions.', 1)
_THREADS = flags.DEFINE_list('threads', ['1', '2'], 'Numbers of threads.')
_WORKERS = flags.DEFINE_list('workers', [], 'Numbers of worker processes.')
_MEMORY_IMAGES = flags.DEFINE_integer(
  'memory_images', 0, 'Images to read while memory is watched; 0 to skip it.', 0
)


def run(arguments: Sequence[str]) -> None:
  from drnet_jax.bench import input as bench

  if not _PACKED.value:
    raise UserError('--packed is missing: name a packed file of images')
  try:
    threads = tuple(map(int, _THREADS.value))
    workers = tuple(map(int, _WORKERS.value))
    if min(threads + workers, default=0) < 0:
      raise ValueError('they begin at 0')
  except ValueError as error:
    raise UserError(f'--threads, --workers: {error}') from error
  bench.run(
    bench.Input(
      packed=_PACKED.value,
      split=_SPLIT.value,
      images=_IMAGES.value,
      size_px=_SIZE_PX.value,
      batch_size=_BATCH_SIZE.value,
      turns=_TURNS.value,
      threads=threads,
      workers=workers,
      memory_images=_MEMORY_IMAGES.value,
    )
  )
