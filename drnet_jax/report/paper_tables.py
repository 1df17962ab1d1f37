# SPDX-License-Identifier: Apache-2.0
"""The tables of DRNet's paper (arXiv:2106.02898), as printed.

They are the paper's results, not ours. A row's key is its name in the sets of
`configs/sets` and in `set.json`. The rows are in `paper_tables.csv`.
"""

import csv
import importlib.resources
from typing import NamedTuple


class PaperRow(NamedTuple):
  """One row; what the paper does not print is ''.

  Attributes:
    gmacs: 1e9 multiply-adds, the predictor counted.
    top1, top5: in %.
    parameters: in 1e6.
  """

  gmacs: str
  top1: str
  top5: str
  parameters: str


class PaperTable(NamedTuple):
  """One table: what it shows, data set and network, rows by key in order."""

  title: str
  setting: str
  rows: dict[str, PaperRow]


def _rows(table: int) -> dict[str, PaperRow]:
  file = importlib.resources.files('drnet_jax.report') / 'paper_tables.csv'
  lines = csv.reader(file.read_text('utf-8').splitlines())
  return {
    row: PaperRow(*x) for number, row, *x in lines if number == str(table)
  }


_IMAGENET_100 = (
  'ImageNet-100 (its own choice of classes), ResNet-50 at 112/168/224 px'
)
_ABOUT = (
  ('ResNet-50 on ImageNet-100', _IMAGENET_100),
  ('Influence of the FLOPs loss', _IMAGENET_100),
  (
    'ResNet-50 and ResNet-101 on ImageNet-1k',
    'ImageNet-1k, ResNet-50 and ResNet-101 at 112/168/224 px',
  ),
  ('Against pruned networks on ImageNet-1k', 'ImageNet-1k, ResNet-50'),
  ('Dynamic against random sizes', 'ImageNet-1k, ResNet-50 at 112/168/224 px'),
  ('MobileNetV2 on ImageNet-1k', 'ImageNet-1k, MobileNetV2 at 168/196/224 px'),
)
TABLES = {
  number: PaperTable(*about, _rows(number))
  for number, about in enumerate(_ABOUT, 1)
}
