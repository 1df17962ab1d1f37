# SPDX-License-Identifier: Apache-2.0
"""The rows of the paper's Tables 1, 2 and 5 on Imagenette, for a CPU.

python -m drnet_jax sweep --set=configs/sets/imagenette.py --workdir=runs/nette
--config.data.data_dir=imagenette2.npz

alpha is given as a share of the largest size's cost; the paper's 2.0, 2.5 and
3.0 of 4.09 GMACs are .49, .61 and .73. Fixed sizes are trained for as many
epochs as both stages of the others together. One row alone:

python -m drnet_jax.main --config="configs/sets/imagenette.py:no FLOPs loss"
--workdir=runs/nette_no_loss --config.data.data_dir=imagenette2.npz
"""

import ml_collections

from configs import imagenette

TITLE = 'Imagenette, ResNet-18 of width 16 at 64, 96 and 128 px'
TABLES = ()

_FULL_GMACS = 0.0442  # at 128 px
_PREDICTOR_ALONE = {
  'alpha': 0.4,
  'eta': 1.0,
  'gradient': 'all',
  'explore': 1.0,
  'finetune.epochs': 9,
  'finetune.schedule.lr': 1e-4,
  'finetune.optimizer.predictor_lr': 500.0,
}
ROWS = {  # share of the full cost (alpha), fields of model, losses, or anything
  'no FLOPs loss': {},
  'alpha .61 eta .2': {'alpha': 0.61, 'eta': 0.2},
  'fixed 128': {'resolutions': (128,)},
  'all gradients alpha .61 eta 1': {
    'alpha': 0.61,
    'eta': 1.0,
    'gradient': 'all',
  },
  'random': {'predictor': {'network': 'random'}},
  'alpha .61 eta .2 shared norms': {
    'alpha': 0.61,
    'eta': 0.2,
    'resolution_aware_bn': False,
  },
  'alpha .49 eta .1': {'alpha': 0.49, 'eta': 0.1},
  'alpha .49 eta .2': {'alpha': 0.49, 'eta': 0.2},
  'alpha .49 eta .5': {'alpha': 0.49, 'eta': 0.5},
  'alpha .49 eta 1': {'alpha': 0.49, 'eta': 1.0},
  'alpha .73 eta .2': {'alpha': 0.73, 'eta': 0.2},
  'fixed 96': {'resolutions': (96,)},
  # Between the costs of two sizes: no single size will do.
  'alpha .4 eta 1': {'alpha': 0.4, 'eta': 1.0},
  'all gradients alpha .4 eta 1': {
    'alpha': 0.4,
    'eta': 1.0,
    'gradient': 'all',
  },
  'all gradients mixture alpha .4 eta 1': {
    'alpha': 0.4,
    'eta': 1.0,
    'gradient': 'all',
    'loss': 'mixture',
  },
  'all gradients distilled alpha .4 eta 1': {
    'alpha': 0.4,
    'eta': 1.0,
    'gradient': 'all',
    'distill': 0.5,
  },
  # Statistics of a size that few images choose keep up with the weights.
  'no FLOPs loss fresh': {'statistics': 'fresh'},
  'all gradients fresh alpha .61 eta 1': {
    'alpha': 0.61,
    'eta': 1.0,
    'gradient': 'all',
    'statistics': 'fresh',
  },
  'all gradients fresh alpha .4 eta 1': {
    'alpha': 0.4,
    'eta': 1.0,
    'gradient': 'all',
    'statistics': 'fresh',
  },
  # The network stays as pretrained, but for its statistics in the first.
  'predictor alone alpha .4 eta 1': _PREDICTOR_ALONE,
  'predictor alone kept statistics alpha .4 eta 1': _PREDICTOR_ALONE
  | {'statistics': 'running'},
}


def get_config(row: str) -> ml_collections.ConfigDict:
  config = imagenette.get_config()
  for field, value in ROWS[row].items():
    if field == 'alpha':
      config.finetune.objective.target_gmacs = value * _FULL_GMACS
    elif '.' in field:
      config.update_from_flattened_dict({field: value})
    elif field in config.model:
      config.model[field] = value
    elif field in config.pretrain.objective:
      config.pretrain.objective[field] = value
    else:
      config.finetune.objective[field] = value
  if len(config.model.resolutions) == 1:
    config.pretrain.epochs += config.finetune.epochs
    config.pretrain.eval_every_epochs = config.pretrain.epochs
    config.model.predictor = None
    config.model.image_px = max(config.model.resolutions)
    config.data.resize_px = round(config.model.image_px * 256 / 224)
    config.stages = ('pretrain',)
  return config
