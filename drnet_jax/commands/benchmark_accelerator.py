# SPDX-License-Identifier: Apache-2.0
"""Measures an accelerator in eight minutes, in one command.

    python -m drnet_jax benchmark_accelerator --out=runs/gpu \\
        --config=configs/accelerator.py \\
        --config.data.data_dir=imagenette_160.npz

Nine parts, each with a time limit; `launch/gpu_suite.sh` calls this with a hard
limit of eight minutes:

a  versions, device, and its ceilings: a matrix product and a copy
b  correctness: routed step against a dense one, RANet, a cascade, a checkpoint
c  training steps of ResNet-50 in bfloat16, and how long each took to compile
d  inference, in bulk and one at a time
e  a profile of the routed step: its most expensive kernels, and idle time
f  the same network in PyTorch, where installed, beside our fixed size
g  a real training of --config, from scratch, and its report; and of --finetune,
   which is to begin with weights:
   --finetune=configs/accelerator.py:weights --finetune.init_from=resnet50.npz
   --finetune.data.data_dir=imagenette_160.npz
h  more training steps: of other kinds, and of 64, 128 and 512 images
i  compiling one program, by the ways that XLA has to tune it for a GPU

Leaves `accelerator.csv`, written row by row, so that what was finished when the
command was cut off is there; and at the end a page, also as Markdown. A part
that fails is noted with its reason; `--parts=g` runs it again, and what the
others found stays. On a GPU most of the time goes into compiling: what was
compiled is kept, and a second call gets further. Without an accelerator each
part is tiny.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from drnet_jax.commands import cli
from drnet_jax.errors import UserError

_OUT = flags.DEFINE_string('out', None, 'Output folder.')
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config of the training of part g, on a packed file.'
)
_FINETUNE = config_flags.DEFINE_config_file(
  'finetune', None, 'Config of another training of part g, from weights.'
)
_PARTS = flags.DEFINE_string(
  'parts', 'abcdefghi', 'Letters of the parts to run.'
)
_SECONDS = flags.DEFINE_float('seconds', 470, 'Time limit of all parts.', 1)


def run(arguments: Sequence[str]) -> None:
  import jax

  from drnet_jax.bench import accelerator
  from drnet_jax.bench.accelerator_parts import Suite

  if not _OUT.value:
    raise UserError('--out is missing: name a folder for the results')
  if not _PARTS.value or set(_PARTS.value) - set(_PARTS.default):
    raise UserError(f'--parts={_PARTS.value} are not letters of a to i')
  print(
    accelerator.run(
      Suite(
        out=_OUT.value,
        seconds=_SECONDS.value,
        small=jax.default_backend() == 'cpu',
        config=cli.read_config(_CONFIG.value),
        finetune=cli.read_config(_FINETUNE.value) if _FINETUNE.value else None,
        parts=_PARTS.value,
      )
    )
  )
