# SPDX-License-Identifier: Apache-2.0
"""The tables of DRNet's paper (arXiv:2106.02898), as printed.

They are the paper's results, not ours. A row's key is its name in the sets of
`configs/sets` and in `set.json`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PaperRow:
  """One row; what the paper does not print is ''.

  Attributes:
    gmacs: 1e9 multiply-adds, the predictor counted.
    top1, top5: in %.
    parameters: in 1e6.
  """

  gmacs: str
  top1: str
  top5: str = ''
  parameters: str = ''


@dataclasses.dataclass(frozen=True)
class PaperTable:
  """One table: what it shows, data set and network, rows by key in order."""

  title: str
  setting: str
  rows: dict[str, PaperRow]


TABLES = {
  1: PaperTable(
    'ResNet-50 on ImageNet-100',
    'ImageNet-100 (its own choice of classes), ResNet-50 at 112/168/224 px',
    {
      'fixed 224': PaperRow('4.1', '78.5'),
      'no FLOPs loss': PaperRow('3.4', '82.5'),
      'alpha 2.5 eta 0.2': PaperRow('2.8', '81.4'),
      'alpha 2.5 eta 0.2 shared norms': PaperRow('2.9', '80.3'),
    },
  ),
  2: PaperTable(
    'Influence of the FLOPs loss',
    'ImageNet-100 (its own choice of classes), ResNet-50 at 112/168/224 px',
    {
      'alpha 2.0 eta 0.2': PaperRow('2.3', '80.6'),
      'alpha 2.5 eta 0.2': PaperRow('2.8', '81.4'),
      'alpha 3.0 eta 0.2': PaperRow('3.3', '82.3'),
      'alpha 3.5 eta 0.2': PaperRow('3.5', '82.6'),
      'alpha 3.0 eta 0.1': PaperRow('3.3', '82.1'),
      'alpha 3.0 eta 0.5': PaperRow('3.1', '81.9'),
      'alpha 3.0 eta 1.0': PaperRow('3.1', '81.5'),
    },
  ),
  3: PaperTable(
    'ResNet-50 and ResNet-101 on ImageNet-1k',
    'ImageNet-1k, ResNet-50 and ResNet-101 at 112/168/224 px',
    {
      'fixed 224': PaperRow('4.1', '76.1', '92.9', '25.6'),
      'no FLOPs loss': PaperRow('3.7', '77.5', '93.5', '30.5'),
      'alpha 2.0': PaperRow('2.3', '75.3', '92.2', '30.5'),
      'alpha 2.5': PaperRow('2.7', '76.2', '92.8', '30.5'),
      'alpha 3.0': PaperRow('3.2', '77.0', '93.2', '30.5'),
      'alpha 3.5': PaperRow('3.7', '77.4', '93.5', '30.5'),
      'ResNet-101 fixed 224': PaperRow('7.8', '77.4', '93.5', '44.5'),
      'ResNet-101 DRNet': PaperRow('7.0', '79.0', '94.3', '49.4'),
    },
  ),
  4: PaperTable(
    'Against pruned networks on ImageNet-1k',
    'ImageNet-1k, ResNet-50',
    {
      'fixed 224': PaperRow('4.1', '76.1', '92.9', '25.6'),
      'fixed 192': PaperRow('3.0', '74.3', '91.9', '25.6'),
      'SSS': PaperRow('2.8', '74.2', '91.9'),
      'Versatile': PaperRow('3.0', '74.5', '91.8', '11.0'),
      'PFP-A': PaperRow('3.7', '75.9', '92.8', '20.9'),
      'C-SGD70': PaperRow('2.6', '75.3', '92.5'),
      'DRNet': PaperRow('3.7', '77.5', '93.5', '30.5'),
      'DRNet alpha 2.0': PaperRow('2.3', '75.3', '92.2', '30.5'),
    },
  ),
  5: PaperTable(
    'Dynamic against random sizes',
    'ImageNet-1k, ResNet-50 at 112/168/224 px',
    {
      'random 1': PaperRow('2.6', '74.70'),
      'random 2': PaperRow('2.6', '74.65'),
      'random 3': PaperRow('2.6', '74.60'),
      'random mean': PaperRow('2.6', '74.65 ± 0.04'),
      'DRNet': PaperRow('3.7', '77.5'),
    },
  ),
  6: PaperTable(
    'MobileNetV2 on ImageNet-1k',
    'ImageNet-1k, MobileNetV2 at 168/196/224 px',
    {
      'fixed 224': PaperRow('0.300', '71.8', parameters='3.5'),
      'fixed 192': PaperRow('0.221', '70.7', parameters='3.5'),
      'width 0.75': PaperRow('0.209', '69.8', parameters='2.6'),
      'DRNet': PaperRow('0.283', '72.7', parameters='3.8'),
    },
  ),
}
