# SPDX-License-Identifier: Apache-2.0
"""Photographs: what a predictor of sizes adds to a trained network for several.

python -m drnet_jax sweep --set=configs/sets/photos_router.py
--workdir=runs/photos_router --config.data.data_dir=photos
--config.init_from=runs/photos/ensemble_teaches

DRNet's second stage on photographs, from a network for its sizes, here a row of
configs/sets/photos.py: by the paper's gradient and by all, with a predictor
that begins at random, the paper's for this network, and with one that begins
with the trained network's own weights. The report compares their routers with
cascades and fixed sizes of the same weights.
"""

import ml_collections

from configs import photos

TITLE = 'Photographs: a router after a network for three sizes'
TABLES = ()

_OWN_WEIGHTS = {'predictor': 'base', 'model.predictor_px': 48}
_ALL = {'finetune.objective.gradient': 'all'}
ROWS = {  # fields of the config, and whose layout the predictor has
  'chosen gradient': {},
  'all gradients': _ALL,
  'all gradients own weights': _ALL | _OWN_WEIGHTS,
}


def get_config(row: str) -> ml_collections.ConfigDict:
  config = photos.get_config()
  config.stages = ('finetune',)
  config.reset_head = False
  config.model.predictor = {'network': 'inverted_residual4'}
  stage = config.finetune
  for field in ('epochs', 'batch_size', 'eval_every_epochs'):
    stage[field] = config.pretrain[field]
  stage.schedule = config.pretrain.schedule
  stage.schedule.lr = 1e-4
  stage.optimizer = config.pretrain.optimizer
  stage.optimizer.predictor_lr = 10.0
  stage.objective.statistics = 'fresh'
  stage.objective.eta = 1.0
  stage.objective.target_gmacs = 0.063  # between 64 and 112 px
  stage.objective.bucket_growth = 2.0
  fields = dict(ROWS[row])
  if fields.pop('predictor', None) == 'base':
    config.model.predictor = config.model.base  # padding and all, as it is set
    stage.optimizer.predictor_lr = 3.0
  config.update_from_flattened_dict(fields)
  return config
