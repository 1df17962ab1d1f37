# SPDX-License-Identifier: Apache-2.0
"""A trained model for other programs."""

# What command lines may ask for, where importing what does it would take long.
RUNTIMES = ('auto', 'jax', 'onnx', 'openvino', 'stablehlo')
PRECISIONS = ('auto', 'f32', 'bf16', 'f16')
DECODINGS = ('full', 'scaled')
FORMATS = ('onnx', 'stablehlo')
WEIGHTS = ('folded', 'shared')
