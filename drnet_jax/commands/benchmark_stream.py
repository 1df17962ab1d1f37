# SPDX-License-Identifier: Apache-2.0
"""Does a service keep its deadline here? Streams images at several loads.

    python -m drnet_jax benchmark_stream --workdir=runs/photos --deadline_ms=50

Images of the test split arrive at random (Poisson) at shares of the rate at
which this machine answers them in bulk by the most expensive option. The run's
best policy (or what `--policy` and `--budget_*` ask for), its router as trained
and that option take turns. For each: how many answers came after the deadline
(`late`), how many images left with what was known because no time was left for
more (`hurried`), milliseconds from arrival to answer, and top-1.

Leaves `stream.csv` in `<workdir>/report`.
"""

import os
from collections.abc import Sequence

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.commands.flags import A_POLICY, PRECISION, RUNTIME, asked
from drnet_jax.errors import UserError
from drnet_jax.run import paths

USES = ('runtime', 'precision', *A_POLICY)
_DEADLINE_MS = flags.DEFINE_float(
  'deadline_ms', 50.0, 'From arrival to answer, milliseconds.', 0.0
)
_LOADS = flags.DEFINE_list(
  'loads', ['0.3', '0.6', '0.9', '1.2'], 'Rates, shares of that in bulk.'
)
_IMAGES = flags.DEFINE_integer('images', 1000, 'Images of a stream.', 1)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Streams of each load.', 1)


def run(arguments: Sequence[str]) -> None:
  path = cli.workdir()
  try:
    loads = [float(x) for x in _LOADS.value]
  except ValueError as error:
    raise UserError(f'--loads: {error}') from error
  if not all(0 < load < float('inf') for load in loads):
    raise UserError('--loads must be above 0')
  from drnet_jax import tables, terminal
  from drnet_jax.bench import streams, subjects
  from drnet_jax.serve.classifier import Classifier

  subject = subjects.of_workdir(path, _IMAGES.value, asked())
  classifier = Classifier.load(
    path, runtime=RUNTIME.value, precision=PRECISION.value
  )
  rows = streams.benchmark(
    classifier,
    subject,
    loads=loads,
    deadline_ms=_DEADLINE_MS.value,
    rounds=_ROUNDS.value,
  )
  print(f'{os.cpu_count()} processor cores, {classifier.runtime}')
  print(terminal.table(tables.cells(rows)))
  path = os.path.join(paths.root(path), 'report', 'stream.csv')
  os.makedirs(os.path.dirname(path), exist_ok=True)
  tables.write_csv(path, rows)
  print(f'Written: {path}')
