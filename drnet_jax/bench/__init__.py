# SPDX-License-Identifier: Apache-2.0
"""Stopwatches: inference, training, input, and what rivals take."""
