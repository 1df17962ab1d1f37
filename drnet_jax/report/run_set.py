# SPDX-License-Identifier: Apache-2.0
"""Several runs that one report compares: a set of experiments, or any runs."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from drnet_jax.errors import UserError
from drnet_jax.report import evaluated
from drnet_jax.report.evaluated import EvaluatedRun
from drnet_jax.report.paper_tables import TABLES
from drnet_jax.run import ladder

FILE = 'set.json'


class RunSet(NamedTuple):
  """Rows of a table.

  Attributes:
    path: folder that holds them.
    title: what they are.
    tables: numbers of the paper's tables that they fill.
    runs: by the name of the row; None where it is not evaluated yet. A run may
      have several names, for several tables.
  """

  path: str
  title: str
  tables: Sequence[int]
  runs: Mapping[str, EvaluatedRun | None]


def is_set(path: str) -> bool:
  """Whether a folder holds a set of experiments."""
  return os.path.exists(os.path.join(path, FILE))


def read(path: str) -> RunSet:
  """Reads the folder of a set.

  Its `set.json` has `title`, `tables` (numbers of the paper's) and `rows`: the
  workdir of each by name, from the folder. What is not evaluated stays empty.

  Raises:
    UserError: the file is damaged, or names a table that is not in the paper.
  """
  file = os.path.join(path, FILE)
  try:
    with open(file) as opened:
      fields = json.load(opened)
    title, numbers = fields['title'], tuple(fields['tables'])
    workdirs = {
      name: os.path.normpath(os.path.join(path, row))
      for name, row in fields['rows'].items()
    }
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{file} is damaged ({error}): run the set again'
    ) from error
  for number in numbers:
    if number not in TABLES:
      raise UserError(f'{file}: table {number} is not one of {sorted(TABLES)}')
  read_once = {
    workdir: evaluated.read(workdir)
    for workdir in dict.fromkeys(workdirs.values())
    if evaluated.is_evaluated(workdir)
  }
  runs = {name: read_once.get(workdir) for name, workdir in workdirs.items()}
  return RunSet(path, title, numbers, runs)


def of(paths: Sequence[str]) -> RunSet:
  """Runs that are not a set; their rows are named after their folders.

  Raises:
    UserError: one of them is not evaluated.
  """
  paths = [os.path.abspath(path) for path in paths]
  names = ladder.short_names(paths)
  runs = {n: evaluated.read(p) for n, p in zip(names, paths, strict=True)}
  return RunSet(os.path.commonpath(paths), f'{len(paths)} runs', (), runs)
