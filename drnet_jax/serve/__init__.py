# SPDX-License-Identifier: Apache-2.0
"""Inference: each image at the options that a policy picks."""
