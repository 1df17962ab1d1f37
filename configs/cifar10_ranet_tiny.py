# SPDX-License-Identifier: Apache-2.0
"""A RANet of 32 M multiply-adds on CIFAR-10: exits and budgets in minutes.

python -m drnet_jax.main --config=configs/cifar10_ranet_tiny.py
--workdir=runs/ranet_tiny
python -m drnet_jax calibrate --workdir=runs/ranet_tiny

Eight short epochs, 33,000 images in all: a fifth of a percent of the authors'
training. With a packed file (data/packed.py) in place of TFDS's:

python -m drnet_jax.main --config=configs/cifar10_ranet_tiny.py
--workdir=runs/ranet_tiny --config.data.name=packed
--config.data.data_dir=cifar10.npz --config.data.test_split=val

Measured on a copy of CIFAR-10 in JPEGs of quality 75: 48.3 % at the first exit,
50.2 % at the last (results/ranet_cifar10.md).
"""

import ml_collections

from configs import cifar10_ranet


def get_config() -> ml_collections.ConfigDict:
  config = cifar10_ranet.get_config()
  config.data.held_out = 5000
  config.data.validation_split = 'held_out'
  config.data.epoch_images = 4096
  config.data.threads = 1
  config.model.network.configuration = 'cifar_tiny'
  config.checkpoint_every_epochs = 0.5  # it may be cut off
  config.exits.epochs = 8
  config.exits.eval_every_epochs = 4
  return config
