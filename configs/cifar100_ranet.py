# SPDX-License-Identifier: Apache-2.0
"""RANet on CIFAR-100, the anytime model (arXiv:2003.07326).

python -m drnet_jax.main --config=configs/cifar100_ranet.py --workdir=runs/ranet

As configs/cifar10_ranet.py, preparing and budgeted models too. The paper's
figures, read off a plot (ours are not measured yet):

  MMACs  15.8  31.3  44.7  50.4  60.7  63.7  90.3  95.0
  top-1  66.3  69.4  71.7  71.7  72.3  72.5  73.8  74.4
"""

import ml_collections

from configs import cifar10_ranet


def get_config() -> ml_collections.ConfigDict:
  config = cifar10_ranet.get_config()
  config.data.name = 'cifar100'
  config.model.mean = (0.5071, 0.4867, 0.4408)
  config.model.std = (0.2675, 0.2565, 0.2761)
  return config
