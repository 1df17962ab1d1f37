# SPDX-License-Identifier: Apache-2.0
"""Several runs that one report compares: a set of experiments, or any runs."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

from drnet_jax.errors import UserError
from drnet_jax.report import paper_tables
from drnet_jax.report import run as run_lib
from drnet_jax.report.paper_tables import PaperTable
from drnet_jax.report.run import Run

FILE = 'set.json'


@dataclasses.dataclass(frozen=True)
class RunSet:
  """Rows of a table.

  Attributes:
    path: folder that holds them.
    title: what they are.
    number: of the paper's table that they fill; None for none.
    runs: by the name of the row; None where it is not evaluated yet.
  """

  path: str
  title: str
  number: int | None
  runs: Mapping[str, Run | None]

  @property
  def table(self) -> PaperTable | None:
    """The paper's, if they fill one."""
    return self.number and paper_tables.TABLES[self.number]


def is_set(path: str) -> bool:
  """Whether a folder holds a set of experiments."""
  return os.path.exists(os.path.join(path, FILE))


def read(path: str) -> RunSet:
  """Reads the folder of a set.

  Its `set.json` has `title`, `table` (a number, or null) and `rows`: the
  workdir of each, from the folder. Rows that are not evaluated stay empty.

  Raises:
    UserError: the file is damaged, or names a table that the paper has not.
  """
  file = os.path.join(path, FILE)
  try:
    with open(file) as opened:
      fields = json.load(opened)
    title, number, rows = fields['title'], fields['table'], fields['rows']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{file} is damaged ({error}): run the set again'
    ) from error
  if number is not None and number not in paper_tables.TABLES:
    raise UserError(
      f'{file}: table {number} is none of {sorted(paper_tables.TABLES)}'
    )
  paths = {name: os.path.join(path, row) for name, row in rows.items()}
  return RunSet(
    path=path,
    title=title,
    number=number,
    runs={
      name: run_lib.read(p) if run_lib.is_evaluated(p) else None
      for name, p in paths.items()
    },
  )


def of(paths: Sequence[str]) -> RunSet:
  """Runs that are no set; their rows are named after their folders.

  Raises:
    UserError: one of them is not evaluated.
  """
  paths = [os.path.abspath(path) for path in paths]
  names = [os.path.basename(path) for path in paths]
  if len(set(names)) < len(names):
    names = paths
  return RunSet(
    path=os.path.commonpath(paths),
    title=f'{len(paths)} runs',
    number=None,
    runs={n: run_lib.read(p) for n, p in zip(names, paths, strict=True)},
  )
