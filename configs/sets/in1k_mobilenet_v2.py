# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 6: MobileNetV2 on ImageNet-1k.

python -m drnet_jax sweep --set=configs/sets/in1k_mobilenet_v2.py
--workdir=runs/in1k_mnv2
"""

import ml_collections

from configs import in1k_fixed_mobilenet_v2, in1k_mobilenet_v2

TITLE = 'ImageNet-1k, MobileNetV2 at 168, 196 and 224 px'
TABLES = (6,)

ROWS = {  # the config, and the fields in which a row differs
  'DRNet': (in1k_mobilenet_v2, {}),
  'fixed 224': (in1k_fixed_mobilenet_v2, {}),
  'fixed 192': (
    in1k_fixed_mobilenet_v2,
    {'model.resolutions': (192,), 'model.image_px': 192},
  ),
  'width 0.75': (in1k_fixed_mobilenet_v2, {'model.base.width': 0.75}),
}


def get_config(row: str) -> ml_collections.ConfigDict:
  base, fields = ROWS[row]
  config = base.get_config()
  config.update_from_flattened_dict(fields)
  return config
