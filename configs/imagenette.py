# SPDX-License-Identifier: Apache-2.0
"""DRNet on Imagenette in hours on two CPU cores: a ResNet-18 of width 16.

python -m drnet_jax.main --config=configs/imagenette.py --workdir=runs/nette
--config.data.data_dir=imagenette2.npz

The paper's recipe made short: ten classes of photographs, sizes 64, 96 and 128
px, a schedule of nine epochs instead of 170, a predictor with the learning rate
of the rest. Reads a packed file (data/packed.py); for image folders
train/<class>/ and val/<class>/ add --config.data.name=folder. Of the training
images 400 are held out to watch and to calibrate with; 'val' is the test.

configs/sets/imagenette.py has the rows of the paper's Tables 1, 2 and 5 on this
scale, results/imagenette.md what we measured.
"""

import ml_collections

from configs import in1k


def get_config() -> ml_collections.ConfigDict:
  config = in1k.get_config()
  config.eval_batch_size = 200
  config.log_every_steps = 20
  config.data.name = 'packed'
  config.data.data_dir = 'imagenette2.npz'
  config.data.held_out = 400
  config.data.validation_split = 'held_out'
  config.data.test_split = 'val'
  config.data.resize_px = 146
  config.data.threads = 1
  config.model.base = {'network': 'resnet18', 'width': 16}
  config.model.predictor = {'network': 'resnet10', 'width': 8}
  config.model.predictor_px = 64
  config.model.image_px = 128
  config.model.resolutions = (64, 96, 128)
  for stage, epochs in ((config.pretrain, 6), (config.finetune, 3)):
    stage.epochs = epochs
    stage.batch_size = 64
    stage.eval_every_epochs = epochs
    stage.schedule.kind = 'cosine'
    stage.schedule.lr = 0.05
    stage.schedule.warmup_epochs = 0.5
    stage.optimizer.predictor_lr = 1.0
  config.finetune.batch_size = 128
  config.finetune.objective.target_gmacs = 0.044  # of no use while eta is 0
  config.finetune.objective.bucket_growth = 1.5
  return config
