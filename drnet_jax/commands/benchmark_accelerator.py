# SPDX-License-Identifier: Apache-2.0
"""Measures an accelerator in eight minutes, in one command.

    python -m drnet_jax benchmark_accelerator --out=runs/gpu \\
        --config=configs/accelerator.py \\
        --config.data.data_dir=imagenette_160.npz

Six parts, each with a time limit; `launch/gpu_suite.sh` calls this with a hard
limit of eight minutes:

a  versions, device, and its ceilings: a matrix product and a copy
b  correctness: routed step against a dense one, RANet, a cascade, a checkpoint
c  training steps of ResNet-50 in bfloat16, beside PyTorch where installed
d  inference, in bulk and one at a time, beside PyTorch where installed
e  a profile of the routed step: its most expensive kernels, and idle time
f  a real training of --config from scratch (and from --weights), and its report

Leaves `accelerator.csv`, written row by row, so that what was finished when the
command was cut off is there; and at the end a page, also as Markdown. A part
that fails is noted with its reason. Without an accelerator each part is tiny.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from drnet_jax.commands import cli
from drnet_jax.errors import UserError

_OUT = flags.DEFINE_string('out', None, 'Output folder.')
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config of the training of part f, on a packed file.'
)
_WEIGHTS = flags.DEFINE_string(
  'weights', '', 'File of PyTorch weights to train from as well.'
)
_SECONDS = flags.DEFINE_float('seconds', 470, 'Time limit of all parts.', 1)


def run(arguments: Sequence[str]) -> None:
  import jax

  from drnet_jax.bench import accelerator

  if not _OUT.value:
    raise UserError('--out is missing: name a folder for the results')
  print(
    accelerator.run(
      accelerator.Suite(
        out=_OUT.value,
        seconds=_SECONDS.value,
        small=jax.default_backend() == 'cpu',
        config=cli.read_config(_CONFIG.value),
        weights=_WEIGHTS.value,
      )
    )
  )
