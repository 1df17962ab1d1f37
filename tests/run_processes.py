# SPDX-License-Identifier: Apache-2.0
"""Tiny runs on several processes, for tests: children that start at once."""

import os
import socket
import sys

import forked
from absl import flags

from configs import smoke
from drnet_jax import processes
from drnet_jax.commands import cli
from drnet_jax.run import train

# Long enough for a busy machine, short enough for a test.
PEER_TIMEOUT_S = 10


def tiny_config(data_dir: str, **changes):
  """30 routed steps of a small net, a row of metrics each."""
  config = smoke.get_config()
  config.data.data_dir = data_dir
  config.data.validation_split = 'validation[:64]'
  config.data.epoch_images = 16 * 30
  config.eval_batch_size = 64
  config.log_every_steps = 1
  config.model.base.stage_sizes = (1,)
  config.model.base.width = 4
  config.model.predictor.stage_sizes = (1,)
  config.model.predictor.width = 4
  config.model.resolutions = (16, 64)
  config.stages = ('finetune',)
  config.finetune.epochs = 1.0
  config.finetune.ema_decay = 0.9
  config.finetune.batch_size = 16
  config.finetune.eval_every_epochs = 1.0
  config.finetune.schedule.warmup_epochs = 0.1
  config.finetune.objective.explore = 0.5
  config.finetune.objective.bucket_growth = 8.0
  config.finetune.objective.target_gmacs = 0.00005
  config.checkpoint_every_epochs = 0.1
  config.update_from_flattened_dict(changes)
  return config


def start(path, config, *, num_processes=1, devices=1):
  """Starts a run; returns its processes, of Python's multiprocessing.

  They keep what they compile beside the run: one that is killed while it writes
  there may leave what nobody else should read.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  environment = forked.own_cache(os.path.join(os.path.dirname(path), 'cache'))
  # The last of a name counts.
  environment['XLA_FLAGS'] = ' '.join(
    [
      os.environ['XLA_FLAGS'],
      f'--xla_force_host_platform_device_count={devices}',
    ]
  )
  children = []
  for i in range(num_processes):
    if num_processes > 1:
      environment |= {
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': str(num_processes),
        'JAX_PROCESS_ID': str(i),
      }
    children.append(forked.start(_train, config, path, **environment))
  return children


def run(path, config, **shape) -> None:
  """Runs to the end; raises if a process fails."""
  children = start(path, config, **shape)
  for child in children:
    child.join()
  codes = [child.exitcode for child in children]
  assert not any(codes), f'exit statuses {codes}'


def _train(config, path) -> None:
  """What `main` does of a run, but for the report."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  with processes.leaving_together():
    cli.run_command(lambda: _joined(config, path))


def _joined(config, path) -> None:
  processes.join(peer_timeout_s=PEER_TIMEOUT_S)
  try:
    train.train(config, path)
  except processes.Stopped:
    sys.exit(processes.PREEMPTED)
  except Exception as error:
    processes.exit_if_peer_was_lost(error)
    raise
