# SPDX-License-Identifier: Apache-2.0
"""Exports a trained model to ONNX and StableHLO.

    python -m drnet_jax export --workdir=runs/quickstart --to=exported

Writes the folder that `export.package` describes: a predictor and one graph per
size, with what a program needs to run any policy. `--workdir` may name several
runs with commas between, or the folder of a ladder. `--policy` and `--budget_*`
set what it does unless told otherwise. Then runs images of the test split
through JAX and through what was written, by that policy and some of them at
every option, and fails unless they agree (`--check_images=0` leaves that out).
The result runs without JAX:

    python exported/run.py photo.jpg

or with it: `python -m drnet_jax predict --workdir=exported photo.jpg`.
"""

import os
from collections.abc import Sequence

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.commands.flags import A_POLICY, AN_OPTION, DECODE, TO, set_policy
from drnet_jax.errors import UserError
from drnet_jax.export import FORMATS, WEIGHTS

USES = ('to', 'decode', *A_POLICY, *AN_OPTION)
_FORMATS = flags.DEFINE_list('formats', list(FORMATS), 'Formats to export.')
_WEIGHTS = flags.DEFINE_enum(
  'weights',
  'folded',
  WEIGHTS,
  'folded: norms inside the convolutions, fastest. shared: one copy of the '
  'convolutions for all sizes, smallest.',
)
_CHECK_IMAGES = flags.DEFINE_integer(
  'check_images', 1000, 'Images of the test split to compare on; 0 for none.', 0
)

# Images to compare at each option: the policy may never choose some of them.
_IMAGES_OF_AN_OPTION = 100

parse_flags = cli.keep_overrides


def run(arguments: Sequence[str]) -> None:
  from drnet_jax import terminal
  from drnet_jax.choosing.policy import fixed
  from drnet_jax.serve import parity
  from drnet_jax.serve.classifier import Classifier

  path, folder = cli.model(), TO.value
  if not folder:
    raise UserError('--to is missing: name a folder to write')
  # Before the long work: data may be missing.
  images = _check_images(path, arguments)
  decode, formats = DECODE.value or 'full', tuple(_FORMATS.value)
  ours = Classifier.load(path, runtime='jax', decode=decode)
  set_policy(ours)
  ours.export(folder, formats=formats, weights=_WEIGHTS.value)
  rows = []
  for name in sorted(os.listdir(folder)):
    size = os.path.getsize(os.path.join(folder, name))
    rows.append({'file': name, 'MB': f'{size / 1e6:.3f}'})
  print(terminal.table(rows))
  if not images:
    return
  policies = {'as it will run': (ours.policy, images)} | {
    name: (fixed(j), images[:_IMAGES_OF_AN_OPTION])
    for j, name in enumerate(ours.contract.options.names)
  }
  for runtime in formats:
    theirs = Classifier.load(folder, runtime=runtime)
    for name, (policy, some) in policies.items():
      ours.policy = theirs.policy = policy
      found = parity.compare(ours, theirs, some)
      print(f'{found.runtime}, {name}: {found}')
      if not found.holds:
        raise UserError(f'{folder}: {runtime} does not agree with JAX')


def _check_images(
  path: str | list[str], overrides: Sequence[str]
) -> list[bytes | str]:
  """Images to compare on; none where none are wanted."""
  if not _CHECK_IMAGES.value:
    return []
  from drnet_jax import settings
  from drnet_jax.data.pipeline import Data
  from drnet_jax.run import ladder, paths, workdir

  if not isinstance(path, str) or ladder.is_ladder(path):
    path = next(iter(ladder.members(path).values()))
  path = paths.root(path)
  names = workdir.class_names(path)
  config = workdir.read_config(path, overrides)
  data = settings.call(Data, config.data, 'config.data')
  try:
    examples = data.open(data.test_split, names).examples
  except UserError as error:
    raise UserError(
      f'{error}. To export without comparing: --check_images=0'
    ) from error
  count = min(_CHECK_IMAGES.value, len(examples))
  return [examples[i]['image'] for i in range(count)]
