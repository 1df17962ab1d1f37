# SPDX-License-Identifier: Apache-2.0

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from drnet_jax import flops


def test_grouped_convolution_counts_its_own_channels_only():
  network = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False)
  x = jnp.zeros((1, 5, 5, 4))
  variables = network.init(jax.random.key(0), x)
  # 25 places x 9 taps x 1 input channel of the group x 8 outputs
  assert flops.count_macs(network.apply, variables, x) == 25 * 9 * 1 * 8


def test_a_convolution_without_outputs_costs_nothing():
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  x = jnp.zeros((1, 5, 5, 4))
  assert flops.count_macs(convolve, x, jnp.zeros((3, 3, 4, 0))) == 0


def test_products_in_loops_and_branches():
  w = jnp.zeros((3, 3))

  def loop(x):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, length=7)[0]

  def branch(x):
    return jax.lax.cond(x.sum() > 0, lambda y: y @ w @ w, lambda y: y, x)

  x = jnp.zeros((2, 3))
  assert flops.count_macs(loop, x) == 7 * 2 * 3 * 3
  assert flops.count_macs(branch, x) == 2 * (2 * 3 * 3)
  assert flops.count_macs(jax.jit(loop), x) == 7 * 2 * 3 * 3


def test_unknown_length_is_refused():
  w = jnp.zeros((3, 3))

  def endless(x):
    return jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ w, x)

  with pytest.raises(ValueError, match='while loop'):
    flops.count_macs(endless, jnp.zeros((3, 3)))
