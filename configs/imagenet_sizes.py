# SPDX-License-Identifier: Apache-2.0
"""Which size does each image need? A trained ImageNet network at seven sizes.

python -m drnet_jax convert --config=configs/imagenet_sizes.py
--from_torch=resnet50.pth --workdir=runs/sizes
python -m drnet_jax.main --mode=evaluate --workdir=runs/sizes

The paper's Figure 1, from weights trained at one size only: nothing is trained
here. Evaluates the packed file of config.data.data_dir, each image squashed to
the size whole. results/imagenet_sizes.md has what we measured.
"""

import ml_collections

from configs import in1k_fixed


def get_config() -> ml_collections.ConfigDict:
  config = in1k_fixed.get_config()
  config.eval_batch_size = 50
  config.data.name = 'packed'
  config.data.data_dir = 'imagenet_val1300_227.npz'
  config.data.held_out = 0
  config.data.validation_split = 'val[1000:]'
  config.data.test_split = 'val[:1000]'
  config.data.resize_px = 227
  config.data.threads = 1
  config.model.image_px = 227  # each size straight from the whole image
  config.model.resolutions = (96, 112, 128, 160, 168, 192, 224)
  return config
