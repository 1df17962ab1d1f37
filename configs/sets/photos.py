# SPDX-License-Identifier: Apache-2.0
"""Photographs: what the sizes of a network learn from each other.

python -m drnet_jax sweep --set=configs/sets/photos.py --workdir=runs/photos
--config.data.data_dir=photos --config.init_from=mobilenet_v2.safetensors

Four ways to train one network for 64, 112 and 160 px, and what they are held
against: a network for each size, finetuned alone on as many images. All are
tested on the same crops.
"""

import ml_collections

from configs import photos

TITLE = 'Photographs: one network for three sizes, and one for each'
TABLES = ()

ROWS = {  # fields of the config
  'ensemble teaches smaller': {},
  'ensemble teaches': {'pretrain.objective.teacher': 'ensemble'},
  'largest teaches': {'pretrain.objective.teacher': 'largest'},
  'labels alone': {'pretrain.objective.distill': 0.0},
  '64 px alone': {'model.resolutions': (64,)},
  '112 px alone': {'model.resolutions': (112,)},
  '160 px alone': {'model.resolutions': (160,)},
}


def get_config(row: str) -> ml_collections.ConfigDict:
  config = photos.get_config()
  config.update_from_flattened_dict(ROWS[row])
  if len(config.model.resolutions) == 1:
    config.pretrain.objective.distill = 0.0  # there is nobody to learn from
  return config
