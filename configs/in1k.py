# SPDX-License-Identifier: Apache-2.0
"""DR-ResNet-50 on ImageNet-1k (arXiv:2106.02898, Tables 3 and 4).

python -m drnet_jax.main --config=configs/in1k.py --workdir=runs/in1k

170 epochs. The paper's figures (30.5 M parameters), ours are not measured yet:

  alpha   GMACs   top-1   top-5
  none     3.7     77.5    93.5
  3.5      3.7     77.4    93.5
  3.0      3.2     77.0    93.2
  2.5      2.7     76.2    92.8
  2.0      2.3     75.3    92.2

The command above is the first row. The others, here for alpha = 2.0, need only
the second stage again:

python -m drnet_jax.main --config=configs/in1k.py --workdir=runs/in1k_alpha2
--config.stages="('finetune',)" --config.init_from=runs/in1k_pretrained
--config.finetune.objective.eta=0.2
--config.finetune.objective.target_gmacs=2.0

with runs/in1k_pretrained from --config.stages="('pretrain',)". From ImageNet
weights of torchvision instead: --config.init_from=resnet50.pth.

The data is TFDS's imagenet2012, prepared as ArrayRecord; for image folders
train/<class>/ and val/<class>/ add --config.data.name=folder
--config.data.data_dir=... --config.data.test_split=val

10,000 training images (.8 %) are held out to calibrate policies on; for the
paper's protocol to the letter: --config.data.held_out=0
--config.data.validation_split=validation
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()  # train.Run
  config.seed = 0
  config.init_from = ''
  config.reset_head = False
  config.eval_batch_size = 256
  config.log_every_steps = 100
  config.checkpoint_every_epochs = 1.0
  config.keep_checkpoints = 2
  config.parameter_shards = 1  # devices that share a copy of the weights

  config.data = {  # data.pipeline.Data
    'name': 'imagenet2012',
    'data_dir': '',
    'train_split': 'train',
    # Watched, and policies are calibrated on it: not the images of the report.
    'validation_split': 'held_out',
    'test_split': 'validation',
    'epoch_images': 0,
    'least_epoch_images': 0,
    'augmentation': 'random_resized_crop',
    'least_crop': 0.08,  # of an image's area
    'flip': 0.5,
    'mixup': 0.0,
    'cutmix': 0.0,
    'rand_augment': (),
    'resize_px': 256,
    'keep_aspect': True,  # False: squash, the paper's '256 x 256' literally
    'classes': '',
    'class_map': '',
    'unlabelled': '',
    'images_per_class': 0,
    'held_out': 10_000.0,
    'max_bad_images': 10,
    'max_pixels': 0,
    'keys': ('image', 'label'),
    'threads': 16,
    'workers': 0,
  }
  config.model = {  # models.create_drnet
    'base': {
      'network': 'resnet50',
      'padding': 'symmetric',
      'dtype': 'float32',
    },
    'predictor': {'network': 'resnet10', 'dtype': 'float32'},
    'predictor_px': 128,
    'image_px': 224,
    'resolutions': (112, 168, 224),
    'resolution_aware_bn': True,
    'antialias': True,
    'mean': (0.485, 0.456, 0.406),
    'std': (0.229, 0.224, 0.225),
  }

  config.stages = ('pretrain', 'finetune')
  optimizer = {  # optim.create
    'name': 'sgd',
    'momentum': 0.9,
    'weight_decay': 1e-4,
    'decay_norms_and_biases': True,
    'clip_norm': 0.0,
    'predictor_lr': 0.1,  # x the schedule's
    'head_lr': 1.0,  # the same, of the classifier
  }
  schedule = {  # optim.schedule
    'kind': 'step',
    'lr': 0.1,
    'warmup_epochs': 3.0,
    'decay_epochs': 20,
    'decay_factor': 0.1,
  }
  config.pretrain = {  # stage.Stage
    'step': 'pretrain',
    'epochs': 70.0,
    'batch_size': 256,
    'accumulate': 1,  # steps to an update
    'ema_decay': 0.0,
    'eval_every_epochs': 5.0,
    'schedule': schedule,
    'optimizer': optimizer,
    'objective': {  # steps.pretrain.PretrainObjective
      'label_smoothing': 0.0,
      'distill': 0.0,  # share of the teacher's answer in the labels
      'teacher': 'largest',  # or 'ensemble', 'ensemble_below'
    },
  }
  config.finetune = {  # stage.Stage
    'step': 'routed',
    'epochs': 100.0,
    'batch_size': 256,
    'accumulate': 1,  # steps to an update
    'ema_decay': 0.0,
    'eval_every_epochs': 5.0,
    'schedule': schedule | {'decay_epochs': 30},
    'optimizer': optimizer,
    'objective': {  # steps.routed_objective.RoutedObjective
      'label_smoothing': 0.0,
      'gradient': 'chosen',  # the paper's; see docs/method.md on 'all'
      'explore': 0.25,  # of 'all' only
      'loss': 'expected',  # of 'all' only
      'statistics': 'batch',  # the paper's; or 'fresh', 'running'
      'tau': (1.0, 1.0),
      'tau_epochs': 0,
      'eta': 0.0,  # no FLOPs loss
      'eta_warmup_epochs': 0,
      'target_gmacs': 4.1,  # alpha
      'target_epochs': 0,
      'usage_weight': 0.0,
      'bucket_growth': 1.125,
      'costs': (),  # C_j: GMACs; or milliseconds from `calibrate --measure`
    },
  }
  return config
