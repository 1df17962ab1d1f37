# SPDX-License-Identifier: Apache-2.0
"""Rows of results: as csv files, and as cells for people."""

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def write_csv(path: str, rows: Sequence[Row]) -> None:
  """Writes rows of equal keys, with a header, in place of what was there."""
  with open(path, 'w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def cells(rows: Iterable[Row]) -> list[dict[str, str]]:
  """Rows for people: four digits of a floating-point number."""
  return [
    {k: f'{v:.4g}' if isinstance(v, float) else str(v) for k, v in row.items()}
    for row in rows
  ]


def interval(name: str, around: Any) -> dict[str, float | str]:
  """A number and the ends of its `Interval` as a row; '' where it is None."""
  values = dataclasses.astuple(around) if around else ('', '', '')
  return dict(zip((name, f'{name}_low', f'{name}_high'), values, strict=True))
