# SPDX-License-Identifier: Apache-2.0
"""What one training step computes, one module per kind of step."""
