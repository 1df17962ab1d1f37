# SPDX-License-Identifier: Apache-2.0
"""The paper's Tables 1 and 2: DR-ResNet-50 on ImageNet-100, eta and alpha.

python -m drnet_jax sweep --set=configs/sets/in100.py --workdir=runs/in100
--config.data.data_dir=/data/imagenet

Three first stages of 70 epochs and nine second ones of 100, of 50,000 images.
"""

import ml_collections

from configs import in100, in100_fixed

TITLE = 'ImageNet-100, ResNet-50 at 112, 168 and 224 px'
TABLES = (1, 2)

ROWS = {  # fields of the loss
  'fixed 224': {},
  'no FLOPs loss': {},
  'alpha 2.5 eta 0.2': {'target_gmacs': 2.5, 'eta': 0.2},
  'alpha 2.5 eta 0.2 shared norms': {'target_gmacs': 2.5, 'eta': 0.2},
  'alpha 2.0 eta 0.2': {'target_gmacs': 2.0, 'eta': 0.2},
  'alpha 3.0 eta 0.2': {'target_gmacs': 3.0, 'eta': 0.2},
  'alpha 3.5 eta 0.2': {'target_gmacs': 3.5, 'eta': 0.2},
  'alpha 3.0 eta 0.1': {'target_gmacs': 3.0, 'eta': 0.1},
  'alpha 3.0 eta 0.5': {'target_gmacs': 3.0, 'eta': 0.5},
  'alpha 3.0 eta 1.0': {'target_gmacs': 3.0, 'eta': 1.0},
}


def get_config(row: str) -> ml_collections.ConfigDict:
  if row == 'fixed 224':
    return in100_fixed.get_config()
  config = in100.get_config()
  config.finetune.objective.update(ROWS[row])
  config.model.resolution_aware_bn = not row.endswith('shared norms')
  return config
