# SPDX-License-Identifier: Apache-2.0
"""What a path of a run names, found without reading any of it."""

import os


def root(path: str) -> str:
  """The workdir that a path names: itself, or that of a checkpoint."""
  return parts(path)[0]


def parts(path: str) -> tuple[str, str | None, int | None]:
  """Workdir, stage and step that a path names."""
  names = os.path.normpath(path).split(os.sep)
  if len(names) > 2 and names[-1].isdigit() and names[-3] == 'checkpoints':
    workdir = os.sep.join(names[:-3]) or ('.' if names[0] else os.sep)
    return workdir, names[-2], int(names[-1])
  return path, None, None
