# SPDX-License-Identifier: Apache-2.0
"""Converts weights from and to PyTorch.

    python -m drnet_jax convert --config=configs/in1k.py \\
        --from_torch=resnet50.safetensors --workdir=runs/imported

makes a workdir that can be evaluated, asked (`predict`) and trained from
(`--config.init_from=runs/imported`). Of the config's data only the names of the
classes are read. Every size gets a copy of the file's batch norms.

    python -m drnet_jax convert --workdir=runs/in1k \\
        --to_torch=resnet50_112.safetensors --size_px=112

writes the base network with the norms of one size, under the names of
torchvision (or --naming=timm). Formats: .safetensors, .npz, and with PyTorch
installed .pth.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from drnet_jax.commands import cli
from drnet_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'File of the config, and --config.<field>=<value>.'
)
_FROM_TORCH = flags.DEFINE_string(
  'from_torch', None, 'File of weights to read.'
)
_TO_TORCH = flags.DEFINE_string('to_torch', None, 'File of weights to write.')
_SIZE_PX = flags.DEFINE_integer(
  'size_px', None, 'Size whose norms to write, px.'
)
_NAMING = flags.DEFINE_enum(
  'naming', 'torchvision', ['torchvision', 'timm'], 'Names of the weights.'
)


def run(arguments: Sequence[str]) -> None:
  path = cli.workdir()
  if bool(_FROM_TORCH.value) == bool(_TO_TORCH.value):
    raise UserError('give either --from_torch or --to_torch')
  from drnet_jax import terminal
  from drnet_jax.run import weights

  if _FROM_TORCH.value:
    config = cli.read_config(_CONFIG.value)
    weights.import_torch(config, _FROM_TORCH.value, path)
    terminal.say(f'Wrote {path}')
    return
  if _SIZE_PX.value is None:
    raise UserError(
      '--size_px is missing: name the size whose batch norms to write'
    )
  weights.export_torch(path, _TO_TORCH.value, _SIZE_PX.value, _NAMING.value)
  terminal.say(f'Wrote {_TO_TORCH.value}')
