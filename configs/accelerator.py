# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 on Imagenette for minutes on an accelerator.

python -m drnet_jax.main --config=configs/accelerator.py --workdir=runs/nette160
python -m drnet_jax.main --config=configs/accelerator.py:weights
--config.init_from=resnet50.safetensors --workdir=runs/nette160_finetuned

The first is the paper's DRNet from scratch, as configs/imagenette.py has it;
the second finetunes weights, as configs/photos.py does. In bfloat16, at the
sizes that a packed file of 50 MiB allows, as launch/pack_imagenette.py makes
it. They are the last part of launch/gpu_suite.sh, which sets the epochs by the
time that is left.
"""

import ml_collections

from configs import imagenette, photos


def get_config(start: str = 'scratch') -> ml_collections.ConfigDict:
  """`start`: 'scratch' or 'weights'."""
  config = {'scratch': imagenette, 'weights': photos}[start].get_config()
  config.eval_batch_size = 256
  config.data.name = 'packed'
  config.data.data_dir = 'imagenette_160.npz'
  config.data.held_out = 400
  config.data.threads = 16
  config.data.resize_px = 160  # the files' own
  config.model.base = {
    'network': 'resnet50',
    'padding': 'symmetric',
    'dtype': 'bfloat16',
  }
  config.model.image_px = 160
  config.model.resolutions = (80, 112, 160)
  config.pretrain.batch_size = 128
  config.pretrain.eval_every_epochs = 1000.0  # in the end alone
  if start == 'scratch':
    config.model.predictor = {'network': 'resnet10', 'dtype': 'bfloat16'}
    config.model.predictor_px = 80
    config.finetune.batch_size = 256
    config.finetune.eval_every_epochs = 1000.0
    config.finetune.objective.gradient = 'all'
    config.finetune.objective.eta = 1.0
    # Few programs: on a GPU each takes 20 s and more to compile.
    config.finetune.objective.bucket_growth = 4.0
    config.finetune.objective.target_gmacs = 1.1  # half of the largest size's
  return config
