# SPDX-License-Identifier: Apache-2.0
"""Command line: exports a trained model to ONNX and StableHLO.

    python -m drnet_jax export --workdir=runs/quickstart --to=exported

Writes the folder that `export.package` describes: a predictor and one graph per
size, with what a program needs to run them. Then runs images of the test split
through JAX and through what was written, at the sizes chosen and some of them
at every size, and fails unless they agree (`--check_images=0` leaves that out).
The result runs without JAX:

    python exported/run.py photo.jpg

or with it: `python -m drnet_jax predict --workdir=exported photo.jpg`.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from absl import flags

from drnet_jax import mesh as mesh_lib
from drnet_jax import settings, terminal
from drnet_jax.commands import cli
from drnet_jax.commands.flags import DECODE
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError
from drnet_jax.export import package
from drnet_jax.export.contract import Contract
from drnet_jax.run import workdir
from drnet_jax.serve import budget
from drnet_jax.serve.classifier import Classifier

_TO = flags.DEFINE_string('to', None, 'Folder to write.')
_FORMATS = flags.DEFINE_list('formats', list(package.FORMATS), 'To write.')
_WEIGHTS = flags.DEFINE_enum(
  'weights',
  'folded',
  package.WEIGHTS,
  'folded: norms inside the convolutions, fastest. shared: one copy of the '
  'convolutions for all sizes, smallest.',
)
_CHECK_IMAGES = flags.DEFINE_integer(
  'check_images', 1000, 'Images of the test split to compare on.', 0
)

_TOLERANCE = 1e-4  # of probabilities
# Scores this close are a tie: which size wins is decided by rounding.
_TIE = 1e-4
# Images to compare at each size: the predictor may never choose some of them.
_IMAGES_OF_A_SIZE = 100


@dataclasses.dataclass(frozen=True)
class Parity:
  """How far one path is from another.

  Attributes:
    runtime: 'onnx', ...
    images: compared.
    ties: images whose size differs while their two best sizes score alike.
    other_sizes: images whose size differs for no such reason.
    largest: difference of probabilities, where the sizes are the same.
  """

  runtime: str
  images: int
  ties: int
  other_sizes: int
  largest: float

  @property
  def holds(self) -> bool:
    """Whether the two agree."""
    return not self.other_sizes and self.largest <= _TOLERANCE


def export(
  path: str,
  folder: str,
  *,
  formats: Sequence[str],
  weights: str,
  decode: str,
) -> None:
  """Writes the latest weights of a workdir as a folder; see `package.write`."""
  trained = workdir.load(path, mesh_lib.create(1))
  package.write(
    folder,
    trained,
    Contract.of(trained, decode=decode),
    budget.read(path),
    formats=formats,
    weights=weights,
  )


def compare(ours: Classifier, theirs: Classifier, images: Sequence) -> Parity:
  """Runs images through two paths of one model."""
  expected = ours.predict(images)
  found = theirs.predict(images)
  ties = other_sizes = 0
  largest = 0.0
  for image, a, b in zip(images, expected, found, strict=True):
    if a.size_px == b.size_px:
      difference = np.abs(a.probabilities - b.probabilities).max()
      largest = max(largest, float(difference))
      continue
    view = ours.view(ours.picture(image))
    best = np.sort(np.asarray(ours.engine.log_p(view[None]))[0])[::-1]
    if best[0] - best[1] <= _TIE:
      ties += 1
    else:
      other_sizes += 1
  return Parity(theirs.engine.name, len(images), ties, other_sizes, largest)


def run(arguments: Sequence[str]) -> None:
  path, folder = cli.workdir(), _TO.value
  if not folder:
    raise UserError('--to is missing: name a folder to write')
  images = _check_images(path)  # before the long work: data may be missing
  decode = DECODE.value or 'full'
  formats = tuple(_FORMATS.value)
  export(path, folder, formats=formats, weights=_WEIGHTS.value, decode=decode)
  files = sorted(os.listdir(folder))
  print(
    terminal.table(
      [
        {
          'file': name,
          'MB': f'{os.path.getsize(os.path.join(folder, name)) / 1e6:.3f}',
        }
        for name in files
      ]
    )
  )
  if not images:
    return
  ours = Classifier.load(path, decode=decode)
  as_chosen = ours.policy
  for runtime in formats:
    theirs = Classifier.load(folder, runtime=runtime)
    ours.policy = as_chosen
    _check(compare(ours, theirs, images), 'as chosen', folder)
    for size_px in ours.contract.resolutions:
      ours.set_size(size_px)
      theirs.set_size(size_px)
      parity = compare(ours, theirs, images[:_IMAGES_OF_A_SIZE])
      _check(parity, f'{size_px} px', folder)


def _check(parity: Parity, sizes: str, folder: str) -> None:
  print(
    f'{parity.runtime}, {sizes}: {parity.images} images, probabilities within '
    f'{parity.largest:.1e} of JAX, sizes differ on {parity.other_sizes}, and '
    f'on {parity.ties} that are ties'
  )
  if not parity.holds:
    raise UserError(f'{folder}: {parity.runtime} does not agree with JAX')


def _check_images(path: str) -> list[bytes | str]:
  """Images to compare on; none where none are wanted."""
  if not _CHECK_IMAGES.value:
    return []
  config = workdir.read_config(workdir.root(path))
  data = settings.call(Data, config.data, 'config.data')
  try:
    examples = data.open(data.test_split).examples
  except UserError as error:
    raise UserError(
      f'{error}. To export without comparing: --check_images=0'
    ) from error
  count = min(_CHECK_IMAGES.value, len(examples))
  return [examples[i]['image'] for i in range(count)]
