# SPDX-License-Identifier: Apache-2.0
"""A trained model for other programs."""
