# SPDX-License-Identifier: Apache-2.0
"""A trained model for other programs."""

# What command lines may ask for, where importing what does it would take long.
RUNTIMES = ('jax', 'onnx', 'stablehlo')
DECODINGS = ('full', 'scaled')
FORMATS = ('onnx', 'stablehlo')
WEIGHTS = ('folded', 'shared')
