# SPDX-License-Identifier: Apache-2.0
"""The paper's Tables 3, 4 and 5: ResNets on ImageNet-1k.

python -m drnet_jax sweep --set=configs/sets/in1k.py --workdir=runs/in1k

eta is 0.2 where there is an alpha; the paper does not say which it took here.
The three random rows differ in the seed of both stages.
"""

import ml_collections

from configs import in1k, in1k_fixed, in1k_random, in1k_resnet101

TITLE = 'ImageNet-1k, ResNets at 112, 168 and 224 px'
TABLES = (3, 4, 5)

_ALPHA = 'finetune.objective.target_gmacs'
_ETA = 'finetune.objective.eta'
ROWS = {  # the config, and the fields in which a row differs
  'no FLOPs loss': (in1k, {}),
  'alpha 2.0': (in1k, {_ALPHA: 2.0, _ETA: 0.2}),
  'alpha 2.5': (in1k, {_ALPHA: 2.5, _ETA: 0.2}),
  'alpha 3.0': (in1k, {_ALPHA: 3.0, _ETA: 0.2}),
  'alpha 3.5': (in1k, {_ALPHA: 3.5, _ETA: 0.2}),
  'random 1': (in1k_random, {}),
  'random 2': (in1k_random, {'seed': 1}),
  'random 3': (in1k_random, {'seed': 2}),
  'fixed 224': (in1k_fixed, {}),
  'fixed 192': (
    in1k_fixed,
    {'model.resolutions': (192,), 'model.image_px': 192},
  ),
  'ResNet-101 DRNet': (in1k_resnet101, {}),
  'ResNet-101 fixed 224': (in1k_fixed, {'model.base.network': 'resnet101'}),
}
# Rows of Tables 4 and 5 that are also rows of Table 3.
ALIASES = {'DRNet': 'no FLOPs loss', 'DRNet alpha 2.0': 'alpha 2.0'}


def get_config(row: str) -> ml_collections.ConfigDict:
  base, fields = ROWS[row]
  config = base.get_config()
  config.update_from_flattened_dict(fields)
  return config
