# SPDX-License-Identifier: Apache-2.0
"""A run: training, evaluation, and what they leave in a workdir."""
