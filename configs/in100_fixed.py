# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 at 224 px on ImageNet-100: the baseline of Table 1.

python -m drnet_jax.main --config=configs/in100_fixed.py
--workdir=runs/in100_fixed --config.data.data_dir=/data/imagenet

The paper: 78.5 % top-1 at 4.1 GMACs, on a hundred classes that are not
published. Ours is not measured yet.
"""

import ml_collections

from configs import in1k_fixed, in100


def get_config() -> ml_collections.ConfigDict:
  config = in1k_fixed.get_config()
  config.data = in100.get_config().data
  return config
