# SPDX-License-Identifier: Apache-2.0
"""Counts multiply-adds (1 MAC = 1 FLOP, as the papers count) of any function.

XLA's own cost analysis counts two per multiply-add and leaves out the taps that
fall on padding; the literature's figures (ResNet-50 = 4.089 GMACs) count every
tap, so we walk the jaxpr.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Macs:
  """Multiply-adds of an image, at each option and in the predictor.

  Attributes:
    sizes: of the base network at each size; of a network with exits, up to each
      exit.
    predictor: 0 without one.
  """

  sizes: tuple[int, ...]
  predictor: int

  @property
  def gmacs(self) -> tuple[float, ...]:
    """`sizes`, in 1e9 multiply-adds."""
    return tuple(macs / 1e9 for macs in self.sizes)


def count_macs(function: Callable, *args, **kwargs) -> int:
  """Multiply-adds of the convolutions and matrix products in one call.

  Args:
    function: anything `jax.make_jaxpr` can trace.
    *args: its arguments; `jax.ShapeDtypeStruct`s will do, nothing is computed.
    **kwargs: keyword arguments, passed as they are (static).

  Returns:
    The count. A loop counts its length times; of a conditional's branches the
    most expensive one counts.

  Raises:
    ValueError: the function holds a `while` loop, whose length is unknown.
  """
  jaxpr = jax.make_jaxpr(lambda *a: function(*a, **kwargs))(*args)
  return _count(jaxpr.jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    _, *others = params['dimension_numbers'].rhs_spec  # all but the outputs
    # One output value = one kernel's worth of products; the kernel's input
    # channels are already per group.
    taps = math.prod(kernel[axis] for axis in others)
    return equation.outvars[0].aval.size * taps
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return equation.outvars[0].aval.size * depth
  if name == 'cond':
    return max(_count(branch.jaxpr) for branch in params['branches'])
  inner = sum(_count(sub) for sub in core.jaxprs_in_params(params))
  if name == 'while' and inner:
    raise ValueError('cannot count the MACs of a while loop: unknown length')
  return inner * params.get('length', 1)
