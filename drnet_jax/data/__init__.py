# SPDX-License-Identifier: Apache-2.0
"""From images on disk to batches in numpy; knows nothing of devices."""
