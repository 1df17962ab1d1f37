# SPDX-License-Identifier: Apache-2.0
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from drnet_jax import flops, models

# Parameters; GMACs by input size. specs: torchvision's networks, and section 4.
GOLDEN = {
  'resnet18': (11_689_512, {224: 1.814, 168: 1.114, 112: 0.485}),
  'resnet34': (21_797_672, {224: 3.664}),
  'resnet50': (25_557_032, {224: 4.089, 168: 2.503, 112: 1.078}),
  'resnet101': (44_549_160, {224: 7.80}),
  'resnet152': (60_192_808, {224: 11.51}),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_parameters_and_macs_of_named_networks(name):
  parameters, gmacs = GOLDEN[name]
  network = models.NETWORKS[name](num_classes=1000)
  for size_px, expected in gmacs.items():
    image = jax.ShapeDtypeStruct((1, size_px, size_px, 3), jnp.float32)
    init = functools.partial(network.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), image)
    count = sum(x.size for x in jax.tree.leaves(variables['params']))
    assert count == parameters
    macs = flops.count_macs(network.apply, variables, image, train=False)
    digits = len(str(expected).partition('.')[2])
    assert round(macs / 1e9, digits) == expected


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
