# SPDX-License-Identifier: Apache-2.0
"""Adaptive-resolution image classification in JAX/Flax."""
