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

from drnet_jax.bench import input


def run(arguments: Sequence[str]) -> None:
  input.run()
