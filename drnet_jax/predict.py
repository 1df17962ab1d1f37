# SPDX-License-Identifier: Apache-2.0
"""Command line: classifies image files with a trained model.

    python -m drnet_jax.predict --workdir=runs/quick photo.png 'more/*.jpg' dir/

Prints, for each image, its class, how likely it is, the size chosen for it,
what that cost and what the network at its full size would have cost. Files that
cannot be read are named at the end, and the exit status is then 2.
"""

import glob
import os
from collections.abc import Sequence

from absl import app, flags
from PIL import Image

from drnet_jax import log
from drnet_jax.command import parse_flags, run_command, set_up
from drnet_jax.deploy.classifier import Classifier
from drnet_jax.errors import UserError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of a trained run.')


def find_images(arguments: Sequence[str]) -> list[str]:
  """Expands folders and globs; files stay as they are.

  Raises:
    UserError: a folder or a pattern holds no image, or a file is not there.
  """
  paths = []
  for argument in arguments:
    if os.path.isdir(argument):
      endings = tuple(Image.registered_extensions())
      found = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(argument)
        for name in names
        if name.lower().endswith(endings)
      )
      what = 'folder'
    elif os.path.exists(argument):
      found, what = [argument], 'file'
    else:
      found, what = sorted(glob.glob(argument)), 'file or pattern'
    if not found:
      raise UserError(f'{what} {argument} holds no image')
    paths += found
  return paths


def main(argv: Sequence[str]) -> None:
  set_up()
  run_command(lambda: _run(argv[1:]))


def _run(arguments: Sequence[str]) -> None:
  if not _WORKDIR.value:
    raise UserError('--workdir is missing: name the directory of a trained run')
  if not arguments:
    raise UserError('name at least one image, folder or pattern')
  paths = find_images(arguments)
  classifier = Classifier.load(_WORKDIR.value)
  read, images, bad = [], [], []
  for path in paths:
    try:
      images.append(classifier.read(path))
      read.append(path)
    except UserError as error:
      bad.append(str(error))
  rows = [
    {
      'image': path,
      'class': found.name,
      'probability': f'{found.probability:.3f}',
      'size': f'{found.size_px} px',
      'GMACs': f'{found.gmacs:.4g}',
      'full size': f'{found.full_gmacs:.4g}',
      'saved': f'{1 - found.gmacs / found.full_gmacs:.0%}',
    }
    for path, found in zip(read, classifier(images), strict=True)
  ]
  if rows:
    print(log.table(rows))
  if bad:
    raise UserError('\n       '.join(bad))


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
