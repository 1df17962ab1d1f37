# SPDX-License-Identifier: Apache-2.0
"""A JAX function of a batch of images as a plain list of operations.

Traced with a symbolic batch; calls are inlined, what does not depend on the
images is computed, what nothing depends on is dropped.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from drnet_jax.errors import UserError

_IDENTITIES = {
  'copy',
  'name',
  'optimization_barrier',
  'reduce_precision',
  'sharding_constraint',
  'stop_gradient',
}
_CALLS = {
  'checkpoint',
  'closed_call',
  'custom_jvp_call',
  'custom_vjp_call',
  'jit',
  'remat2',
}


def _broadcast(x, *, shape, broadcast_dimensions, **_):
  new = [d for d in range(len(shape)) if d not in broadcast_dimensions]
  return np.broadcast_to(np.expand_dims(x, new), shape)


def _iota(*, dtype, shape, dimension, **_):
  numbers = np.arange(shape[dimension], dtype=dtype)
  return _broadcast(numbers, shape=shape, broadcast_dimensions=(dimension,))


# What numpy computes, of floats and booleans: most constants of resizes and
# norms. For each of these XLA would compile a program.
_NUMPY: dict[str, Callable] = {
  'abs': np.abs,
  'add': np.add,
  'and': np.logical_and,
  'broadcast_in_dim': _broadcast,
  'convert_element_type': lambda x, new_dtype, **_: x.astype(new_dtype),
  'div': np.divide,
  'ge': np.greater_equal,
  'gt': np.greater,
  'iota': _iota,
  'le': np.less_equal,
  'lt': np.less,
  'max': np.maximum,
  'min': np.minimum,
  'mul': np.multiply,
  'ne': np.not_equal,
  'reduce_sum': lambda x, axes, **_: x.sum(axes),
  'reshape': lambda x, new_sizes, **_: x.reshape(new_sizes),
  'rsqrt': lambda x, **_: 1 / np.sqrt(x),
  'select_n': lambda which, no, yes, **_: np.where(which, yes, no),
  'sub': np.subtract,
}


@dataclasses.dataclass(eq=False)
class Value:
  """An array of the traced program.

  Attributes:
    shape: of ints, and of symbolic sizes where the batch is.
    dtype: numpy's, with the short floats widened.
    constant: its value where known, of size 1 along symbolic axes.
    uses: how many operations (and outputs) read it.
  """

  shape: tuple
  dtype: np.dtype
  constant: np.ndarray | None = None
  uses: int = 0


@dataclasses.dataclass(eq=False)
class Operation:
  """A primitive, what it reads and what it makes."""

  name: str
  params: dict[str, Any]
  inputs: list[Value]
  outputs: list[Value]


class Program:
  """A function's jaxpr without calls, constants and dead code.

  Attributes:
    input, output: its two ends.
    operations: in order.
  """

  def __init__(self, function: Callable, image: jax.ShapeDtypeStruct):
    """Traces a function as `onnx_graph.convert` is given it.

    Raises:
      UserError: it cannot be traced with a batch of any size.
    """
    (batch,) = jax.export.symbolic_shape('batch')
    argument = jax.ShapeDtypeStruct((batch, *image.shape), image.dtype)
    try:
      closed = jax.make_jaxpr(function)(argument)
    except (
      TypeError,
      jax.errors.JAXTypeError,
      jax.errors.InconclusiveDimensionOperation,
    ) as error:
      raise UserError(
        'the network cannot be traced with a batch of any size (take sizes '
        f'from x.shape, not from len(x)): {error}'
      ) from error
    if len(closed.jaxpr.outvars) != 1:
      raise UserError('a function to export returns one array')
    self.operations: list[Operation] = []
    self.input = _value(closed.jaxpr.invars[0])
    (self.output,) = self._inline(closed, [self.input])
    self.output.uses = 1
    live = []
    for operation in reversed(self.operations):
      if any(x.uses for x in operation.outputs):
        live.append(operation)
        for x in operation.inputs:
          x.uses += 1
    self.operations = live[::-1]

  def _inline(self, jaxpr, arguments) -> list[Value]:
    """Adds the operations of a jaxpr, closed or not; gives what it returns."""
    consts = getattr(jaxpr, 'consts', ())
    jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
    env: dict[Any, Value] = {}

    def read(atom) -> Value:
      if isinstance(atom, core.Literal):
        return _constant(np.asarray(atom.val))
      return env[atom]

    for var, value in zip(jaxpr.constvars, consts, strict=True):
      env[var] = _constant(np.asarray(value))
    env |= zip(jaxpr.invars, arguments, strict=True)
    for equation in jaxpr.eqns:
      inputs = [read(atom) for atom in equation.invars]
      name = equation.primitive.name
      if name in _IDENTITIES:
        outputs = inputs
      elif name in _CALLS:
        params = equation.params
        inner = params.get('jaxpr', params.get('call_jaxpr'))
        outputs = self._inline(inner, inputs)
      elif name == 'cond' and (branch := _known_branch(equation, inputs)):
        outputs = self._inline(branch, inputs[1:])
      elif name == 'platform_index':
        outputs = [_constant(np.zeros((), np.int32))]  # see `_known_branch`
      else:
        outputs = [_value(var) for var in equation.outvars]
        if all(x.constant is not None for x in inputs):
          _evaluate(equation, inputs, outputs)
        else:
          self.operations.append(
            Operation(name, equation.params, inputs, outputs)
          )
      env |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _known_branch(equation, inputs):
  """The branch of a `cond` that is taken whatever the images; or None."""
  branches = equation.params['branches']
  platforms = equation.params.get('branches_platforms')
  if platforms:
    # Written for several platforms: the one that is for all of them.
    return branches[platforms.index(None) if None in platforms else 0]
  index = inputs[0].constant
  return None if index is None else branches[int(index)]


def _value(var) -> Value:
  return Value(tuple(var.aval.shape), _widened(var.aval.dtype))


def _constant(x: np.ndarray) -> Value:
  x = x.astype(_widened(x.dtype))
  return Value(x.shape, x.dtype, x)


def _widened(dtype) -> np.dtype:
  if jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize < 4:
    return np.dtype(np.float32)
  return np.dtype(dtype)


def is_symbolic(size: Any) -> bool:
  """Whether a size is that of the batch, or depends on it."""
  return not isinstance(size, int | np.integer)


def _evaluate(equation, inputs, outputs) -> None:
  """Computes an operation on constants, the batch taken as 1."""
  name, params = equation.primitive.name, equation.params

  def unknown(value: Value) -> int:
    return sum(map(is_symbolic, value.shape))

  least = max(map(unknown, inputs), default=0)
  if (
    name == 'dim_as_value'
    or (name == 'iota' and is_symbolic(params['shape'][params['dimension']]))
    # An axis of the batch is gone: it was summed over, or the like.
    or any(unknown(x) < least for x in outputs)
  ):
    raise UserError('cannot export what depends on how many images there are')

  def concrete(param):
    if isinstance(param, tuple):
      return tuple(1 if jax.export.is_symbolic_dim(d) else d for d in param)
    return param

  params = {k: concrete(v) for k, v in params.items()}
  if params.get('new_dtype') is not None:
    params['new_dtype'] = _widened(params['new_dtype'])
  constants = [x.constant for x in inputs]
  if name in _NUMPY and all(x.dtype.kind in 'fb' for x in constants):
    if isinstance(_NUMPY[name], np.ufunc):
      params = {}  # types, which are those of the inputs
    results = [_NUMPY[name](*constants, **params)]
  else:
    results = equation.primitive.bind(*map(jnp.asarray, constants), **params)
    if not equation.primitive.multiple_results:
      results = [results]
  for output, result in zip(outputs, results, strict=True):
    output.constant = np.asarray(result)
