# SPDX-License-Identifier: Apache-2.0
"""Flags that several commands share: absl lets one module define a name."""

from absl import flags

from drnet_jax.deploy.contract import DECODINGS

DECODE = flags.DEFINE_enum(
  'decode',
  None,
  DECODINGS,
  'full (default): one crop of the whole file, as in training. scaled: JPEGs '
  'are decoded no larger than the largest size needs; answers change a little.',
)
