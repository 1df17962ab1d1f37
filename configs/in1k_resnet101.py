# SPDX-License-Identifier: Apache-2.0
"""DR-ResNet-101 on ImageNet-1k (arXiv:2106.02898, Table 3).

python -m drnet_jax.main --config=configs/in1k_resnet101.py
--workdir=runs/in1k_r101

The paper: 79.0 % top-1, 94.3 % top-5 at 7.0 GMACs, 49.4 M parameters; the fixed
network 77.4 %, 93.5 % at 7.8. Ours is not measured yet.
"""

import ml_collections

from configs import in1k


def get_config() -> ml_collections.ConfigDict:
  config = in1k.get_config()
  config.model.base.network = 'resnet101'
  config.finetune.objective.target_gmacs = 7.8
  return config
