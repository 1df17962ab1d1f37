# SPDX-License-Identifier: Apache-2.0
"""Is it worth it here? Times inference on this machine, path by path.

    python -m drnet_jax benchmark --workdir=runs/quickstart
    python -m drnet_jax benchmark --network=resnet50 --out=runs/speed

With a workdir: its model, its test images, its best policy (or what `--policy`
and `--budget_*` ask for) and its router as trained. With a network's name (a
ResNet, or a configuration of RANet): random weights (predictor ResNet-10 at 128
px, 1000 classes), synthetic images; sizes are drawn with `--shares` while the
predictor runs all the same, and in a cascade from the smallest to the largest
size a third of the images go on; a network with exits is timed at shares of its
cost.

Times, all paths in turn so that a machine that changes its speed does so for
all, medians of the rounds:

* every option by itself, per batch;
* whole predictions by each policy against the most expensive option of the same
  path: one at a time, and in bulk. `implied` is the ratio of their
  multiply-adds, everything counted; `realised` that of their times. Beside
  them that option in OpenVINO as it comes, on crops that lie ready;
* where the time of a single prediction goes: decode, resize, predictor,
  network, and what the host does between;
* decoding files whole against decoding them no larger than needed
  (`decode='scaled'`), and how many answers that changes.

Leaves `speed.csv`, `worth.csv`, `parts.csv`, `decoding.csv` and the figure
`latency` (the paper's Figure 3 where the workdir was evaluated). Training steps
are timed by `benchmark_training`.
"""

import os
from collections.abc import Sequence

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.commands.flags import A_POLICY, asked
from drnet_jax.errors import UserError
from drnet_jax.run import paths

USES = A_POLICY
_NETWORK = flags.DEFINE_string(
  'network', None, 'Network to benchmark with random weights.'
)
_SIZES = flags.DEFINE_list(
  'sizes', ['112', '168', '224'], 'With --network: candidate sizes, px.'
)
_SHARES = flags.DEFINE_list(
  'shares',
  ['0.3', '0.45', '0.25'],
  'With --network: share of the images at each size.',
)
_OUT = flags.DEFINE_string(
  'out', None, 'Output folder; default <workdir>/report.'
)
_PATHS = flags.DEFINE_list(
  'paths',
  [],
  'Runtimes to time: jax, onnx, openvino, torch; default all installed.',
)
_INT8 = flags.DEFINE_string(
  'int8', None, 'Folder that `export --int8` made of the workdir, to time too.'
)
_BATCHES = flags.DEFINE_list(
  'batches', ['1', '8'], 'Batch sizes to time each option at.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Number of timed rounds.', 1)
_IMAGES = flags.DEFINE_integer('images', 80, 'Images per bulk round.', 2)


def run(arguments: Sequence[str]) -> None:
  path = cli.workdir() if cli.WORKDIR.value else None
  if bool(path) == bool(_NETWORK.value):
    raise UserError(
      'give either --workdir (a trained run) or --network (a name)'
    )
  to = _OUT.value or (path and os.path.join(paths.root(path), 'report'))
  if not to:
    raise UserError('--out is missing: name a folder for the results')
  try:
    sizes = [int(x) for x in _SIZES.value]
    batches = [int(x) for x in _BATCHES.value]
    shares = [float(x) for x in _SHARES.value]
  except ValueError as error:
    raise UserError(f'--sizes, --batches, --shares: {error}') from error
  import jax

  from drnet_jax import terminal
  from drnet_jax.bench import inference, subjects
  from drnet_jax.tables import cells, write_csv

  if min(batches, default=1) < 1 or min(shares, default=0) < 0:
    raise UserError('--batches begin at 1, --shares at 0')
  if not path and asked():
    raise UserError('--policy and --budget_* are for a --workdir')
  if not path:
    cli.refuse_beside('--network', _INT8)
  if path:
    subject = subjects.of_workdir(path, _IMAGES.value, asked())
  else:
    subject = subjects.of_network(_NETWORK.value, sizes, shares, _IMAGES.value)
  os.makedirs(to, exist_ok=True)  # before the long work
  contenders = inference.Contenders(
    subject,
    _PATHS.value,
    batches,
    rival=_NETWORK.value or '',
    int8=_INT8.value,
  )
  speed = inference.time_networks(contenders, _ROUNDS.value)
  worth = inference.time_predictions(contenders, _ROUNDS.value)
  tables = {'speed': speed, 'worth': worth}
  if contenders.resizers:
    tables['parts'] = inference.time_parts(contenders, _ROUNDS.value)
  if 'onnx' in contenders.classifiers:
    tables['decoding'] = inference.time_decoding(contenders, _ROUNDS.value)
  device = jax.devices()[0].device_kind
  print(
    f'{device}, {os.cpu_count()} processor cores, {subject.trained.origin}\n'
  )
  for name, rows in tables.items():
    print(terminal.table(cells(rows)), end='\n\n')
    write_csv(os.path.join(to, f'{name}.csv'), rows)
  inference.draw(contenders, speed, os.path.join(to, 'latency'))
  print(inference.verdict(worth))
  print(f'Written to {to}: {", ".join(tables)} (.csv), latency (.png, .svg)')
