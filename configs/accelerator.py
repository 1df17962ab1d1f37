# SPDX-License-Identifier: Apache-2.0
"""DR-ResNet-50 on Imagenette for minutes on an accelerator.

python -m drnet_jax.main --config=configs/accelerator.py --workdir=runs/nette160

In bfloat16, at the sizes that a packed file of 50 MiB allows, as it is made by
launch/pack_imagenette.py. The last part of launch/gpu_suite.sh, which sets the
epochs by the time that is left.
"""

import ml_collections

from configs import imagenette


def get_config() -> ml_collections.ConfigDict:
  config = imagenette.get_config()
  config.data.data_dir = 'imagenette_160.npz'
  config.data.threads = 16
  config.data.resize_px = 160  # the files' own
  config.model.base = {
    'network': 'resnet50',
    'padding': 'symmetric',
    'dtype': 'bfloat16',
  }
  config.model.predictor = {'network': 'resnet10', 'dtype': 'bfloat16'}
  config.model.predictor_px = 80
  config.model.image_px = 160
  config.model.resolutions = (80, 112, 160)
  config.pretrain.batch_size = 128
  config.finetune.batch_size = 256
  config.finetune.objective.gradient = 'all'
  config.finetune.objective.eta = 1.0
  config.finetune.objective.target_gmacs = 1.1  # half of the largest size's
  return config
