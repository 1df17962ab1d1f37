# SPDX-License-Identifier: Apache-2.0
"""Does routing pay in training? Times steps of a run, side by side.

    python -m drnet_jax benchmark_training --workdir=runs/quick

Takes the weights of a finished run, so the images choose sizes in the shares
the run ended with, and times in turn, on the same batches:

* fixed: an ordinary training step at the largest size, no predictor;
* routed: a step of stage 2, predictor counted, for either router gradient.

The bound of a routed step is what its multiply-adds imply: forward and backward
count three times the forward's, sizes that are only explored or refreshed once.
`realised / implied` is the share of that bound which shows on the stopwatch.
"""

import os
from collections.abc import Sequence

from absl import flags

from drnet_jax import memory
from drnet_jax.commands import cli
from drnet_jax.run import paths

_STEPS = flags.DEFINE_integer('steps', 15, 'Timed steps of each kind.', 1)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 0, "Global; 0 for the run's own.", 0
)


def run(arguments: Sequence[str]) -> None:
  memory.use_large_pages()
  from drnet_jax import mesh, tables, terminal
  from drnet_jax.bench import training

  path = cli.workdir()
  rows = training.benchmark(
    path, steps=_STEPS.value, batch_size=_BATCH_SIZE.value
  )
  print(f'{mesh.describe()}, {os.cpu_count()} processor cores')
  print(terminal.table(tables.cells(rows)))
  path = os.path.join(paths.root(path), 'report', 'training_step.csv')
  os.makedirs(os.path.dirname(path), exist_ok=True)
  tables.write_csv(path, rows)
  print(f'Written: {path}')
