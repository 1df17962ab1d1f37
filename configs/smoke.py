# SPDX-License-Identifier: Apache-2.0
"""The quick start in miniature: every part of a run, in a minute.

python -m drnet_jax.main --config=configs/smoke.py --workdir=runs/smoke

For trying an installation, and for our tests. It learns nothing.
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
  config = quickstart.get_config()
  config.data.epoch_images = 128
  config.eval_batch_size = 400
  config.log_every_steps = 2
  config.model.base.stage_sizes = (1,)
  config.model.base.width = 8
  config.model.predictor.stage_sizes = (1,)
  config.model.predictor.width = 8
  config.model.predictor_px = 16
  config.model.resolutions = (16, 32, 64)
  for stage in (config.pretrain, config.finetune):
    stage.batch_size = 32
    stage.epochs = 3
    stage.eval_every_epochs = 1
  config.finetune.objective.target_gmacs = 0.0002
  config.finetune.objective.bucket_growth = 2.0
  config.finetune.objective.explore = 0.25  # an image on each of 8 devices
  return config
