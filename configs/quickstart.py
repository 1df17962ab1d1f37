# SPDX-License-Identifier: Apache-2.0
"""DRNet on scaled_digits: the whole method in a few minutes on two CPU cores.

python -m drnet_jax.main --config=configs/quickstart.py --workdir=runs/quick

Expect, in two to four minutes on two cores, the accuracy of 64 px or more for
52 % of its cost: 3.9 points above the best fixed size there (median of three
seeds, results/quickstart.md).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()  # train.Run
  config.seed = 0
  config.init_from = ''  # a workdir or PyTorch weights to begin with
  config.reset_head = False  # True: but with a new classifier
  config.eval_batch_size = 400
  config.log_every_steps = 10
  config.checkpoint_every_epochs = 1.0
  config.keep_checkpoints = 2
  config.parameter_shards = 1  # devices that share a copy of the weights

  config.data = {  # data.pipeline.Data
    'name': 'scaled_digits',
    'data_dir': '',  # TFDS's default
    'train_split': 'originals',
    'validation_split': 'validation',
    'test_split': 'test',
    'epoch_images': 6144,  # each a fresh composition
    'least_epoch_images': 0,
    'augmentation': 'compose_digits',
    'least_crop': 0.08,
    'flip': 0.0,  # a mirrored digit is no digit
    'mixup': 0.0,  # alpha; 0 is off
    'cutmix': 0.0,  # alpha; 0 is off
    'rand_augment': (),  # (operations, magnitude), such as (2, 9)
    'resize_px': 0,
    'keep_aspect': True,
    'classes': '',
    'class_map': '',  # what the model calls classes of the data
    'unlabelled': '',  # a folder of more images, without a class
    'images_per_class': 0,
    'held_out': 0.0,  # training images set aside as the split 'held_out'
    'max_bad_images': 0,
    'max_pixels': 0,  # 0 for the usual, 89 million
    'keys': ('image', 'label'),  # features of TFDS
    'threads': 1,
    'workers': 0,  # processes in place of threads
  }
  config.model = {  # models.create_drnet
    'base': {  # models.resnet.ResNet; 13.5 MMACs at 64 px
      'network': 'resnet',
      'stage_sizes': (1, 2),
      'width': 32,
      'stem': 'patch',
      'patch_px': 4,
      'zero_init': False,
    },
    'predictor': {  # the same class; 0.6 MMACs
      'network': 'resnet',
      'stage_sizes': (0, 1),
      'width': 24,
      'stem': 'patch',
      'patch_px': 4,
      'zero_init': False,
    },
    'predictor_px': 32,
    'image_px': 64,
    'resolutions': (32, 40, 64),
    'resolution_aware_bn': True,
    'antialias': True,
    'mean': (0.5, 0.5, 0.5),
    'std': (0.25, 0.25, 0.25),
  }

  config.stages = ('pretrain', 'finetune')
  optimizer = {  # optim.create
    'name': 'muon',  # AdamW takes more than twice the epochs of stage 1
    'momentum': 0.9,
    'weight_decay': 0.01,
    'decay_norms_and_biases': False,
    'clip_norm': 0.0,
    'predictor_lr': 1.0,  # x the schedule's
    'head_lr': 1.0,  # the same, of the classifier
  }
  schedule = {  # optim.schedule
    'kind': 'cosine',
    'lr': 0.05,
    'warmup_epochs': 0.25,
    'decay_epochs': 1,  # of kind 'step' only
    'decay_factor': 0.1,  # of kind 'step' only
  }
  config.pretrain = {  # stage.Stage
    'step': 'pretrain',
    'epochs': 1.25,
    'batch_size': 32,
    'accumulate': 1,  # steps to an update
    'ema_decay': 0.0,
    'eval_every_epochs': 0.0,  # the end of the stage only
    'schedule': schedule,
    'optimizer': optimizer,
    'objective': {  # steps.pretrain.PretrainObjective
      'label_smoothing': 0.0,
      'distill': 0.5,  # share of the teacher's answer in the labels
      'teacher': 'ensemble',  # of all sizes, teaches all
    },
  }
  config.finetune = {  # stage.Stage
    'step': 'routed',
    'epochs': 3.0,
    'batch_size': 128,
    'accumulate': 1,  # steps to an update
    'ema_decay': 0.0,
    'eval_every_epochs': 0.0,  # the end of the stage only
    'schedule': schedule | {'lr': 0.015},
    'optimizer': optimizer,
    'objective': {  # steps.routed_objective.RoutedObjective
      'label_smoothing': 0.0,
      'gradient': 'all',
      'explore': 0.125,
      'loss': 'expected',
      'statistics': 'fresh',
      'tau': (1.0, 1.0),
      'tau_epochs': 0,
      'eta': 1.0,
      'eta_warmup_epochs': 1,
      'target_gmacs': 0.0061,  # 45 % of the full size
      'target_epochs': 0,
      'usage_weight': 1.0,  # else the largest size is soon out of use
      'bucket_growth': 2.2,  # three buckets of 128, the middle one for half
      'costs': (),  # C_j: GMACs; or milliseconds from `calibrate --measure`
    },
  }
  return config
