# SPDX-License-Identifier: Apache-2.0
"""DR-ResNet-50 on ImageNet-100 (arXiv:2106.02898, Tables 1 and 2).

python -m drnet_jax.main --config=configs/in100.py --workdir=runs/in100
--config.data.data_dir=/data/imagenet

reads folders train/<class>/ and val/<class>/ of ImageNet; of them 100 classes
(data/imagenet100.txt) and 500 training images of each. (For ArrayRecord see
launch/prepare_imagenet.py, --classes=imagenet100 --images_per_class=500.) The
paper's classes are not published, so its figures are for others; ours are not
measured yet:

  eta   alpha   norms     GMACs   top-1
  0     -       private   3.4     82.5
  0.2   3.5     private   3.5     82.6
  0.2   3.0     private   3.3     82.3
  0.2   2.5     private   2.8     81.4
  0.2   2.0     private   2.3     80.6
  0.1   3.0     private   3.3     82.1
  0.5   3.0     private   3.1     81.9
  1     3.0     private   3.1     81.5
  0.2   2.5     shared    2.9     80.3
  fixed 224 px            4.1     78.5     configs/in100_fixed.py

The command above is the first row. eta and alpha:

python -m drnet_jax.main --config=configs/in100.py --workdir=runs/in100_alpha25
--config.data.data_dir=/data/imagenet --config.finetune.objective.eta=0.2
--config.finetune.objective.target_gmacs=2.5

One set of norms for all sizes:

python -m drnet_jax.main --config=configs/in100.py --workdir=runs/in100_shared
--config.data.data_dir=/data/imagenet --config.finetune.objective.eta=0.2
--config.finetune.objective.target_gmacs=2.5
--config.model.resolution_aware_bn=False

Five candidates (the paper: 81.9 % at 3.0 GMACs):

python -m drnet_jax.main --config=configs/in100.py --workdir=runs/in100_five
--config.data.data_dir=/data/imagenet
--config.model.resolutions="(96,128,160,192,224)"
"""

import ml_collections

from configs import in1k


def get_config() -> ml_collections.ConfigDict:
  config = in1k.get_config()
  config.data.name = 'folder'
  config.data.data_dir = 'imagenet'
  config.data.held_out = 2_500  # 5 %, to calibrate policies on
  config.data.test_split = 'val'
  config.data.classes = 'imagenet100'
  config.data.images_per_class = 500
  return config
