# SPDX-License-Identifier: Apache-2.0
"""RANet on CIFAR-10, the anytime model (arXiv:2003.07326).

python -m drnet_jax.main --config=configs/cifar10_ranet.py --workdir=runs/ranet

300 epochs on all training images, as in the paper. Its figures, read off a plot
(ours are not measured yet), at the exits' costs:

  MMACs  15.8  31.3  44.7  50.4  60.7  63.6  90.2  94.9
  top-1  91.3  91.9  93.1  93.2  93.2  93.4  93.6  93.7

The budgeted models (small, medium, large) learn without 5,000 images that are
held out to set thresholds on (held_out.json in the workdir):

python -m drnet_jax.main --config=configs/cifar10_ranet.py --workdir=runs/small
--config.model.network.configuration=cifar_budgeted_small
--config.data.held_out=5000 --config.data.validation_split=held_out

and likewise cifar_budgeted_medium, cifar_budgeted_large; then

python -m drnet_jax calibrate --workdir=runs/small
--compare=runs/medium,runs/large
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()  # train.Run
  config.seed = 0
  config.init_from = ''
  config.reset_head = False
  config.eval_batch_size = 200
  config.log_every_steps = 50
  config.checkpoint_every_epochs = 1.0
  config.keep_checkpoints = 2
  config.parameter_shards = 1

  config.data = {  # data.pipeline.Data
    'name': 'cifar10',
    'data_dir': '',
    'train_split': 'train',
    # Watched and reported, as in the paper; nothing is selected by it.
    'validation_split': 'test',
    'test_split': 'test',
    'epoch_images': 0,
    'least_epoch_images': 0,
    'augmentation': 'random_shift',
    'least_crop': 0.08,
    'flip': 0.5,
    'mixup': 0.0,
    'cutmix': 0.0,
    'rand_augment': (),
    'resize_px': 0,
    'keep_aspect': True,
    'classes': '',
    'class_map': '',
    'unlabelled': '',
    'images_per_class': 0,
    'held_out': 0.0,
    'max_bad_images': 0,
    'max_pixels': 0,
    'keys': ('image', 'label'),
    'threads': 4,
    'workers': 0,
  }
  config.model = {  # models.create_ranet
    'method': 'ranet',
    'network': {'configuration': 'cifar_anytime'},
    'image_px': 32,
    'mean': (0.4914, 0.4824, 0.4467),
    'std': (0.2471, 0.2435, 0.2616),
  }

  config.stages = ('exits',)
  config.exits = {  # train.Stage
    'step': 'exits',
    'epochs': 300,
    'batch_size': 64,
    'accumulate': 1,
    'ema_decay': 0.0,
    'eval_every_epochs': 5,
    'schedule': {  # optim.schedule
      'kind': 'halfway',
      'lr': 0.1,
      'warmup_epochs': 0,
      'decay_epochs': 0,  # of kind 'step' only
      'decay_factor': 0.1,
    },
    'optimizer': {  # optim.create
      'name': 'sgd',
      'momentum': 0.9,
      'weight_decay': 1e-4,
      'decay_norms_and_biases': True,
      'clip_norm': 0.0,
      'predictor_lr': 1.0,  # there is none
      'head_lr': 1.0,  # nor this
    },
    'objective': {'label_smoothing': 0.0},  # steps.exits.ExitsObjective
  }
  return config
