# SPDX-License-Identifier: Apache-2.0
"""Rows as a csv file."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows of equal keys, with a header."""
  with open(path, 'w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
