# SPDX-License-Identifier: Apache-2.0
"""One file a verb of `python -m drnet_jax`."""
