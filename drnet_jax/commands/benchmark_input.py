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

_PACKED = flags.DEFINE_string('packed', None, 'Packed file of images.')
flags.DEFINE_string('split', 'train', 'Split of the packed file.')
flags.DEFINE_integer('images', 1000, 'Number of images.', 1)
flags.DEFINE_string(
  'enlarge', '', 'Encode the images again at this size, e.g. 500x375.'
)
flags.DEFINE_integer('size_px', 224, 'Side of the crops.', 1)
flags.DEFINE_integer('batch_size', 64, 'Images per batch.', 1)
flags.DEFINE_integer('turns', 5, 'Number of repetitions.', 1)
flags.DEFINE_list('threads', ['1', '2'], 'Numbers of threads to time.')
flags.DEFINE_list('workers', [], 'Numbers of worker processes to time.')
flags.DEFINE_integer(
  'memory_images', 0, 'Images to measure memory over; 0 skips it.', 0
)


def run(arguments: Sequence[str]) -> None:
  if not _PACKED.value:
    raise UserError('--packed is missing: name a packed file of images')
  from drnet_jax.bench import input

  input.run()
