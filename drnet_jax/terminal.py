# SPDX-License-Identifier: Apache-2.0
"""Lines, tables and progress bars; of several processes the main one speaks."""

import sys
from collections.abc import Mapping

from tqdm import tqdm


def say(line: str) -> None:
  """Prints a line without tearing a progress bar."""
  if _is_main():
    # Names of files need not be UTF-8.
    tqdm.write(line.encode(errors='backslashreplace').decode())
    sys.stdout.flush()  # into a log somebody may be waiting for it


def _is_main() -> bool:
  # Several processes have met through JAX; a command that does without it is
  # alone, and should not have to import it.
  if 'jax' not in sys.modules:
    return True
  from drnet_jax import processes

  return processes.is_main()


def progress(*args, **kwargs) -> tqdm:
  """`tqdm.tqdm`, on terminals only, and of the main process alone."""
  return tqdm(*args, disable=None if _is_main() else True, **kwargs)


def table(rows: list[Mapping[str, str]]) -> str:
  """Lays out rows of equal keys as text, numbers to the right."""
  columns = list(rows[0])
  cells = [columns] + [[row[name] for name in columns] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

  def line(row: list[str]) -> str:
    padded = (
      (cell.rjust if i else cell.ljust)(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return '  '.join(padded).rstrip()

  rule = '  '.join('-' * width for width in widths)
  return '\n'.join([line(cells[0]), rule, *map(line, cells[1:])])
