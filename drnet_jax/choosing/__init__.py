# SPDX-License-Identifier: Apache-2.0
"""How much work an image gets: where it starts, when it stops, what counts."""
