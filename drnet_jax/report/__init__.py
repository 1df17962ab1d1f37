# SPDX-License-Identifier: Apache-2.0
"""Tables and figures from what an evaluation recorded for each image."""
