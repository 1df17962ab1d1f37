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

`--int8` then quantises every graph (NNCF) with images of the validation split,
measures on others of them what each size and the predictor lose, and leaves
those in floating point that lose more than `--max_drop` points; if all sizes do
so it refuses.
"""

import os
from collections.abc import Sequence

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.commands.flags import A_POLICY, AN_OPTION, DECODE, TO, set_policy
from drnet_jax.errors import UserError
from drnet_jax.export import FORMATS, WEIGHTS
from drnet_jax.export.contract import is_export

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
_INT8 = flags.DEFINE_bool(
  'int8', False, 'Also put the ONNX graphs into int8, where little is lost.'
)
_MAX_DROP = flags.DEFINE_float(
  'max_drop', 0.5, 'With --int8: points of top-1 that a part may lose.'
)

# Images to compare at each option: the policy may never choose some of them.
_IMAGES_OF_AN_OPTION = 100
_MOST_HELD_OUT = 3000  # that int8 is set and measured on

parse_flags = cli.keep_overrides


def run(arguments: Sequence[str]) -> None:
  from drnet_jax import terminal
  from drnet_jax.serve import int8
  from drnet_jax.serve.classifier import Classifier

  path, folder = cli.model(), TO.value
  if not folder:
    raise UserError('--to is missing: name a folder to write')
  if isinstance(path, str) and is_export(path):
    raise UserError(f'{path} was exported: export the run it came from again')
  if not _INT8.value:
    cli.refuse_beside('graphs in floating point (--int8)', _MAX_DROP)
  decode, formats = DECODE.value or 'full', tuple(_FORMATS.value)
  # Before the long work: data may be missing.
  images = []
  if _CHECK_IMAGES.value:
    examples = _examples(path, 'test_split', '--check_images=0', arguments)
    count = min(_CHECK_IMAGES.value, len(examples))
    images = [examples[i]['image'] for i in range(count)]
  if _INT8.value:
    cli.refuse_beside('--int8', _WEIGHTS)
    if 'onnx' not in formats:
      raise UserError('--int8 needs onnx among --formats')
    int8.check_installed()
    held_out = _examples(path, 'validation_split', '--noint8', arguments)
  import jax

  # What is written is in float32; an accelerator would round it otherwise.
  jax.config.update('jax_platforms', 'cpu')
  ours = Classifier.load(path, runtime='jax', precision='f32', decode=decode)
  set_policy(ours)
  ours.export(folder, formats=formats, weights=_WEIGHTS.value)
  if images:
    _compare(ours, folder, formats, images)
  if _INT8.value:
    # Evenly: in a folder they stand class by class.
    every = -(-len(held_out) // _MOST_HELD_OUT) or 1
    chosen = [held_out[i] for i in range(0, len(held_out), every)]
    parts = int8.quantize(
      folder,
      [example['image'] for example in chosen],
      [example['label'] for example in chosen],
      _MAX_DROP.value,
    )
    print(terminal.table([part.row() for part in parts]))
  rows = []
  for name in sorted(os.listdir(folder)):
    size = os.path.getsize(os.path.join(folder, name))
    rows.append({'file': name, 'MB': f'{size / 1e6:.3f}'})
  print(terminal.table(rows))


def _compare(ours, folder: str, formats: Sequence[str], images: list) -> None:
  """Raises UserError if a format does not answer as JAX does."""
  from drnet_jax.choosing.policy import fixed
  from drnet_jax.serve import parity
  from drnet_jax.serve.classifier import Classifier

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


def _examples(
  path: str | list[str], split: str, without: str, overrides: Sequence[str]
) -> Sequence:
  """A split of the run, or of the first of a ladder.

  Raises:
    UserError: it cannot be opened; `without` is the flag to do without it.
  """
  from drnet_jax.run import ladder, paths, workdir

  if not isinstance(path, str) or ladder.is_ladder(path):
    path = next(iter(ladder.members(path).values()))
  path = paths.root(path)
  names = workdir.class_names(path)
  config = workdir.read_config(path, overrides)
  try:
    return workdir.open_split(path, config, config.data[split], names)[
      1
    ].examples
  except UserError as error:
    raise UserError(f'{error}. To export without it: {without}') from error
