# SPDX-License-Identifier: Apache-2.0
"""RANet on CIFAR-10, the anytime model (arXiv:2003.07326).

python -m drnet_jax.main --config=configs/cifar10_ranet.py --workdir=runs/ranet

Prepare the data once where TensorFlow is installed (TFDS reads its files with
it), as ArrayRecord: tfds build cifar10 --file_format=array_record

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

from configs import in1k


def get_config() -> ml_collections.ConfigDict:
  config = in1k.get_config()
  config.eval_batch_size = 200
  config.log_every_steps = 50
  config.data.name = 'cifar10'
  # Watched and reported, as in the paper; nothing is selected by it.
  config.data.validation_split = 'test'
  config.data.test_split = 'test'
  config.data.augmentation = 'random_shift'
  config.data.resize_px = 0
  config.data.held_out = 0.0
  config.data.max_bad_images = 0
  config.data.threads = 4
  config.model = {  # models.create_ranet
    'method': 'ranet',
    'network': {'configuration': 'cifar_anytime'},
    'image_px': 32,
    'mean': (0.4914, 0.4824, 0.4467),
    'std': (0.2471, 0.2435, 0.2616),
  }
  config.stages = ('exits',)
  config.exits = stage = config.pretrain  # stage.Stage
  del config.pretrain, config.finetune
  stage.step = 'exits'
  stage.epochs = 300
  stage.batch_size = 64
  stage.schedule.kind = 'halfway'
  stage.schedule.warmup_epochs = 0
  stage.schedule.decay_epochs = 0  # of kind 'step' only
  stage.optimizer.predictor_lr = 1.0  # there is none
  stage.objective = {'label_smoothing': 0.0}  # exits.ExitsObjective
  return config
