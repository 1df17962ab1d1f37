# SPDX-License-Identifier: Apache-2.0
"""Your photographs and a trained network: one network for several sizes.

python -m drnet_jax.main --config=configs/photos.py --workdir=runs/photos
--config.data.data_dir=photos --config.init_from=mobilenet_v2.safetensors

Photographs lie in photos/train/<class>/ and photos/val/<class>/; a tenth of the
training images is held out and watched, 'val' is the test. Every image runs at
64, 112 and 160 px, which costs 1.7 times training at 160 px alone, and learns
from the labels, at the smaller sizes also from the ensemble of all. There is no
router. The weights' classifier is replaced. Another network, from a hub, at its
size:

python -m drnet_jax.main --config=configs/photos.py --workdir=runs/photos50
--config.data.data_dir=photos --config.model.base="{'network': 'resnet50'}"
--config.init_from=hf-hub:timm/resnet50.a1_in1k
--config.model.resolutions="(112, 160, 224)" --config.model.image_px=224

docs/photos.md walks through it, results/photos.md says what to expect.
"""

import ml_collections

from configs import in1k


def get_config() -> ml_collections.ConfigDict:
  config = in1k.get_config()
  config.init_from = ''  # a file of weights, a hub's name or folder, a workdir
  config.reset_head = True  # the weights' classes are seldom yours
  config.eval_batch_size = 64
  config.log_every_steps = 20
  config.data.name = 'folder'
  config.data.data_dir = 'photos'
  config.data.held_out = 0.1  # of the training images; or a number of them
  config.data.validation_split = 'held_out'
  config.data.least_epoch_images = 1500  # a few steps do not teach a classifier
  config.data.test_split = 'val'
  config.data.threads = 2
  config.model.base = {
    'network': 'mobilenet_v2',
    'padding': 'symmetric',  # 'same' for TensorFlow's weights
    'dtype': 'float32',
  }
  config.model.predictor = None
  config.model.predictor_px = 64
  config.model.image_px = 160
  config.model.resolutions = (64, 112, 160)
  # Random crops show what is in them larger than a whole image does, so a crop
  # of the middle suits what was learnt from them, small sizes most of all.
  config.data.resize_px = config.model.get_ref('image_px') * 6 // 5
  config.stages = ('pretrain',)
  stage = config.pretrain
  stage.epochs = 4.0
  stage.batch_size = 64
  stage.eval_every_epochs = 1.0
  stage.schedule.kind = 'cosine'
  stage.schedule.lr = 5e-4
  stage.schedule.warmup_epochs = 0.25
  stage.optimizer.name = 'adamw'
  stage.optimizer.weight_decay = 0.01
  stage.optimizer.decay_norms_and_biases = False
  stage.optimizer.clip_norm = 1.0
  stage.objective.distill = 0.5
  stage.objective.teacher = 'ensemble_below'
  return config
