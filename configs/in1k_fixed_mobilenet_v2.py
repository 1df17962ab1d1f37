# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 at one fixed size on ImageNet-1k: the baselines of Table 6.

python -m drnet_jax.main --config=configs/in1k_fixed_mobilenet_v2.py
--workdir=runs/mnv2

trains width 1 at 224 px: the paper has 71.8 % top-1 at 0.300 GMACs. Ours is not
measured yet. At 192 px (70.7 % at 0.221 GMACs there):

python -m drnet_jax.main --config=configs/in1k_fixed_mobilenet_v2.py
--workdir=runs/mnv2_192 --config.model.resolutions="(192,)"
--config.model.image_px=192

Width 0.75 (69.8 % at 0.209 GMACs, 2.6 M parameters there):

python -m drnet_jax.main --config=configs/in1k_fixed_mobilenet_v2.py
--workdir=runs/mnv2_075 --config.model.base.width=0.75
"""

import ml_collections

from configs import in1k_mobilenet_v2


def get_config() -> ml_collections.ConfigDict:
  config = in1k_mobilenet_v2.get_config()
  config.model.predictor = None
  config.model.resolutions = (224,)
  config.stages = ('pretrain',)
  del config.finetune
  return config
