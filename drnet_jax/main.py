# SPDX-License-Identifier: Apache-2.0
"""Command line of drnet_jax: trains what a config says, then evaluates it.

    python -m drnet_jax.main --config=configs/quickstart.py --workdir=runs/quick

Fields of the config can be set from the command line, for instance
--config.finetune.epochs=2. Running the same command again goes on from the
latest checkpoint. --mode=evaluate needs only the workdir.
"""

import jax
import ml_collections
from absl import app, flags
from ml_collections import config_flags

from drnet_jax import command, evaluate, train
from drnet_jax.command import parse_flags, run_command, set_up
from drnet_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'File of the config, and --config.<field>=<value>.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'evaluate'],
  'train: train (or go on), then evaluate. evaluate: the latest checkpoint.',
)


def main(_) -> None:
  set_up()
  run_command(_run)


def _run() -> None:
  path = command.workdir()
  devices = jax.devices()
  print(f'{len(devices)} x {devices[0].device_kind}', flush=True)
  if _MODE.value == 'train':
    train.train(_read_config(), path)
  evaluate.evaluate(path)


def _read_config() -> ml_collections.ConfigDict:
  config = _CONFIG.value
  if config is None:
    raise UserError('--config is missing, e.g. configs/quickstart.py')
  try:
    config.keys()  # what stands in for a file that failed to load raises here
  except OSError as error:
    what = ' '.join(str(error).split())
    raise UserError(f'--config cannot be read: {what}') from error
  return config


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
