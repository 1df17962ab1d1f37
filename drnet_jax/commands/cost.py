# SPDX-License-Identifier: Apache-2.0
"""What training a config should take on machines we do not have: an estimate.

    python -m drnet_jax cost --config=configs/in1k.py

Time is multiply-adds over an assumed share of the device's peak (`--mfu`).
Memory is weights, optimiser and the activations that the backward pass needs.
The balance of a routed step comes from a simulation: images draw sizes at
random, and `routing` fills the buckets as in training. docs/SCALE.md tells how
the model compares with what was measured.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from drnet_jax.commands import cli

_CONFIG = config_flags.DEFINE_config_file('config', None, 'As for main.')
_MFU = flags.DEFINE_float(
  'mfu',
  0.25,
  "Assumed: share of the device's peak that a step reaches.",
  0.001,
  1,
)
_PER_CORE = flags.DEFINE_float(
  'images_per_core',
  500,
  'Training images that a processor core decodes and crops in a second.',
  1,
)
_TRAIN_IMAGES = flags.DEFINE_integer(
  'train_images', 1_281_167, 'Training images, unless the config says.', 1
)


def run(arguments: Sequence[str]) -> None:
  from drnet_jax.bench import cost_model

  print(
    cost_model.report(
      cli.read_config(_CONFIG.value),
      mfu=_MFU.value,
      images_per_core=_PER_CORE.value,
      train_images=_TRAIN_IMAGES.value,
    )
  )
