# SPDX-License-Identifier: Apache-2.0
"""Using a trained model: inference on the chosen size only, and its speed."""
