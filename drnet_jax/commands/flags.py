# SPDX-License-Identifier: Apache-2.0
"""Flags that several commands share: absl lets one module define a name."""

from absl import flags

from drnet_jax.export.contract import DECODINGS
from drnet_jax.serve.classifier import RUNTIMES

RUNTIME = flags.DEFINE_enum(
  'runtime', None, RUNTIMES, 'Default: jax, and onnx for an exported folder.'
)

DECODE = flags.DEFINE_enum(
  'decode',
  None,
  DECODINGS,
  'full (default): one crop of the whole file, as in training. scaled: JPEGs '
  'are decoded at no more than the largest size needs, with a margin; answers '
  'change a little.',
)
