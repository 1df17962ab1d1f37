# SPDX-License-Identifier: Apache-2.0
"""RANet on ImageNet-1k, the anytime model (arXiv:2003.07326).

python -m drnet_jax.main --config=configs/in1k_ranet.py --workdir=runs/ranet

90 epochs of 256 images. The paper's figures, read off a plot (ours are not
measured yet):

  GMACs  .435  .889  1.15  1.35  2.28  2.59  3.24  3.33
  top-1  63.1  67.5  69.5  70.5  74.1  74.7  74.7  74.9

The authors' norms see 64 images, a GPU's; ours the whole batch. The budgeted
models hold 50,000 training images out to set thresholds on; the small one:

python -m drnet_jax.main --config=configs/in1k_ranet.py --workdir=runs/small
--config.model.network.configuration=imagenet_budgeted_small
--config.data.held_out=50000 --config.data.validation_split=held_out

and the large one is the anytime network:

python -m drnet_jax.main --config=configs/in1k_ranet.py --workdir=runs/large
--config.data.held_out=50000 --config.data.validation_split=held_out
"""

import ml_collections

from configs import cifar10_ranet


def get_config() -> ml_collections.ConfigDict:
  config = cifar10_ranet.get_config()
  config.eval_batch_size = 256
  config.log_every_steps = 100
  config.data.name = 'imagenet2012'
  config.data.validation_split = 'validation'
  config.data.test_split = 'validation'
  config.data.augmentation = 'random_resized_crop'
  config.data.resize_px = 256
  config.data.threads = 16
  config.model.network.configuration = 'imagenet'
  config.model.image_px = 224
  config.model.mean = (0.485, 0.456, 0.406)
  config.model.std = (0.229, 0.224, 0.225)
  config.exits.epochs = 90
  config.exits.batch_size = 256
  config.exits.schedule.kind = 'step'
  config.exits.schedule.decay_epochs = 30
  return config
