# SPDX-License-Identifier: Apache-2.0
"""Networks at one fixed size on ImageNet-1k: the baselines of Tables 3 and 4.

python -m drnet_jax.main --config=configs/in1k_fixed.py --workdir=runs/fixed

trains ResNet-50 at 224 px: the paper has 76.1 % top-1, 92.9 % top-5 at 4.1
GMACs. Ours is not measured yet. At 192 px (74.3 %, 91.9 % at 3.0 GMACs there):

python -m drnet_jax.main --config=configs/in1k_fixed.py --workdir=runs/fixed192
--config.model.resolutions="(192,)" --config.model.image_px=192

ResNet-101 (77.4 %, 93.5 % at 7.8 GMACs there):

python -m drnet_jax.main --config=configs/in1k_fixed.py --workdir=runs/r101
--config.model.base.network=resnet101
"""

import ml_collections

from configs import in1k


def get_config() -> ml_collections.ConfigDict:
  config = in1k.get_config()
  config.model.predictor = None
  config.model.resolutions = (224,)
  config.stages = ('pretrain',)
  del config.finetune
  config.pretrain.epochs = 90
  config.pretrain.schedule.decay_epochs = 30
  return config
