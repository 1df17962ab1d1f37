# SPDX-License-Identifier: Apache-2.0
"""Command line of drnet_jax: trains what a config says, then evaluates it.

    python -m drnet_jax.main --config=quickstart --workdir=runs/quick

A config is a file, or the name of one in configs/. Its fields can be set from
the command line, for instance --config.finetune.epochs=2. Running the same
command again resumes from the latest checkpoint. --mode=evaluate needs only the
workdir (and, where the data has moved, --config.data.data_dir=...),
--mode=describe (the model's parameter count and cost) only the config.

Several processes run one command together, see docs/SCALE.md. Exit statuses: 0
done; 2 a mistake to correct; 130 stopped by Ctrl-C, state saved; 75 (stopped by
SIGTERM, state saved), 76 or 134 (another process was lost): run the same
command again on all processes.
"""

# ruff: noqa: E402

import sys

from drnet_jax import memory

if __name__ == '__main__':
  memory.use_large_pages()  # before the imports, which take seconds

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags
from ml_collections import config_flags

from drnet_jax.commands import cli
from drnet_jax.commands import flags as shared
from drnet_jax.errors import UserError

if TYPE_CHECKING:
  from drnet_jax.choosing.options import Costs
  from drnet_jax.run import workdir
  from drnet_jax.serve.classifier import Classifier

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'File or name of the config, and --config.<field>=<value>.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'evaluate', 'describe'],
  'train: train (or resume), then evaluate. evaluate: the latest checkpoint. '
  'describe: parameters and cost of the model, from --config alone.',
)
_PEER_TIMEOUT_S = flags.DEFINE_integer(
  'peer_timeout_s',
  60,
  'Of several processes: all stop when one has been silent for so long.',
  5,
)
for _flag in shared.TIMING:
  flags.declare_key_flag(_flag)


def main(arguments: Sequence[str]) -> None:
  from drnet_jax import processes  # not for --help

  cli.refuse_others(shared.TIMING)
  cli.set_up()
  with processes.leaving_together():
    cli.run_command(lambda: _run(arguments[1:]))


def _run(overrides: Sequence[str]) -> None:
  import jax

  from drnet_jax import mesh, processes, terminal
  from drnet_jax.run import describe, evaluate, train

  shared.check_timing()
  if _MODE.value == 'describe':
    cli.refuse_beside('--mode=describe', shared.MEASURE)
    print(describe.describe(cli.read_config(_CONFIG.value)))
    return
  path = cli.workdir()
  processes.join(peer_timeout_s=_PEER_TIMEOUT_S.value)
  try:
    terminal.say(mesh.describe())
    if shared.MEASURE.value and jax.process_count() > 1:
      raise UserError(
        '--measure times one process: leave it out, and calibrate the run with '
        '--measure when it is done'
      )
    if _MODE.value == 'train':
      train.train(cli.read_config(_CONFIG.value), path)
      overrides = ()  # they are in the run's config
    evaluate.evaluate(path, overrides, _measure)
  except processes.Stopped as stop:
    terminal.say(str(stop))
    sys.exit(stop.status)
  except Exception as error:
    processes.exit_if_peer_was_lost(error)
    raise


def _measure(trained: 'workdir.Trained') -> 'Costs | None':
  """Milliseconds of each option of what was trained, if they are asked for."""

  def load(**how: Any) -> 'Classifier':
    from drnet_jax.serve.classifier import Classifier

    return Classifier.of(trained, **how)

  return shared.measured(load)


if __name__ == '__main__':
  app.run(main, flags_parser=cli.keep_overrides)
