# SPDX-License-Identifier: Apache-2.0
"""DR-MobileNetV2 on ImageNet-1k (arXiv:2106.02898, Table 6).

python -m drnet_jax.main --config=configs/in1k_mobilenet_v2.py
--workdir=runs/in1k_mnv2

The paper: 72.7 % top-1 at 0.283 GMACs, 3.8 M parameters. Ours is not measured
yet. It trains 'as the original MobileNetV2', without giving epochs; the recipe
here (SGD, cosine, weight decay 4e-5) is our choice, and so is the layout of the
predictor, of which it gives the block and the input of 64 px.
"""

import ml_collections

from configs import in1k


def get_config() -> ml_collections.ConfigDict:
  config = in1k.get_config()
  config.model.base = {
    'network': 'mobilenet_v2',
    'width': 1.0,
    'padding': 'symmetric',  # 'same' for weights from TensorFlow
    'dtype': 'float32',
  }
  config.model.predictor.network = 'inverted_residual4'
  config.model.predictor_px = 64
  config.model.resolutions = (168, 196, 224)
  config.pretrain.epochs = 150
  for stage in (config.pretrain, config.finetune):
    stage.schedule.kind = 'cosine'
    stage.schedule.lr = 0.05
    stage.optimizer.weight_decay = 4e-5
    stage.optimizer.decay_norms_and_biases = False
  config.finetune.objective.target_gmacs = 0.3
  return config
