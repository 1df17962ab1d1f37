# SPDX-License-Identifier: Apache-2.0
"""Writes any JAX function of a batch of images as an ONNX model.

The function is traced with a symbolic batch, calls are inlined, and what does
not depend on the images is computed now. Each primitive left becomes one or a
few ONNX operators. Two things make the result as fast as a graph written by
hand:

* A tensor is kept in whatever order of axes its producer wrote, and the order
  is remembered: a transpose of JAX costs nothing, and from the first
  convolution to the last everything is stored channels first, as ONNX has it.
* A scale or shift per channel is put into the convolution or matrix product
  before it, so that inference norms vanish. `fold_norms=False` leaves it
  behind the product, as one multiplication and one addition, so that graphs
  which differ in their norms alone have equal weights to share.

A computation in bfloat16 or float16 is written in float32.
"""

import math
from collections.abc import Callable

import jax
import numpy as np
import onnx

from drnet_jax.errors import UserError
from drnet_jax.export.onnx_builder import Node, Tensor, onnx_type
from drnet_jax.export.onnx_shapes import REDUCTIONS, Shapes
from drnet_jax.export.traced import Operation, Value, trace

# Of the primitives that take arrays of one shape, operators one after another.
_ELEMENTWISE = {
  'abs': 'Abs',
  'add': 'Add',
  'and': 'And',
  'ceil': 'Ceil',
  'cos': 'Cos',
  'div': 'Div',
  'eq': 'Equal',
  'erf': 'Erf',
  'exp': 'Exp',
  'floor': 'Floor',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'log': 'Log',
  'logistic': 'Sigmoid',
  'lt': 'Less',
  'max': 'Max',
  'min': 'Min',
  'mul': 'Mul',
  'ne': 'Equal Not',
  'neg': 'Neg',
  'not': 'Not',
  'or': 'Or',
  'pow': 'Pow',
  'rsqrt': 'Sqrt Reciprocal',
  'sign': 'Sign',
  'sin': 'Sin',
  'sqrt': 'Sqrt',
  'sub': 'Sub',
  'tanh': 'Tanh',
}
_AFFINE = {'add', 'sub', 'mul', 'div'}


def convert(
  function: Callable,
  image: jax.ShapeDtypeStruct,
  *,
  output_name: str,
  fold_norms: bool = True,
) -> onnx.ModelProto:
  """Traces a function and writes it as an ONNX model with a dynamic batch.

  Args:
    function: from one array [B, ...] to one array [B, ...]. What it closes
      over becomes weights.
    image: shape and type of one element of the batch, without B.
    output_name: of the model's output; its input is `onnx_builder.INPUT`.
    fold_norms: see the module.

  Returns:
    The model; its weights are inside.

  Raises:
    UserError: the function needs something that has no counterpart here; the
      message names it.
  """
  program = trace(function, image)
  graph = _Graph(program, fold_norms=fold_norms)
  for operation in program.operations:
    graph.add(operation)
  return graph.finish(output_name)


class _Graph(Shapes):
  """Writes every operation of a program."""

  def add(self, operation: Operation) -> None:
    """Writes the operators of one operation."""
    name, params, inputs = operation.name, operation.params, operation.inputs
    y = operation.outputs if name == 'split' else operation.outputs[0]
    if name in _AFFINE and self._add_affine(name, y, *inputs):
      return
    if name in ('max', 'min') and self._add_activation(name, y, *inputs):
      return
    if name in _ELEMENTWISE:
      names, axes = self._operands(inputs)
      for operator in _ELEMENTWISE[name].split():
        names = [self._emit(operator, names, y, axes).name]
    elif name in REDUCTIONS:
      self._reduce(REDUCTIONS[name], params, y, *inputs)
    elif handler := getattr(self, f'_add_{name}', None):
      handler(params, y, *inputs)
    else:
      shapes = ', '.join(str(list(map(str, x.shape))) for x in inputs)
      raise UserError(
        f'cannot export the JAX primitive {name!r} (on {shapes}) to ONNX; '
        'write that part of the network with other operations, or export '
        'StableHLO only'
      )

  # Elementwise operations.

  def _add_affine(self, name: str, y: Value, left: Value, right: Value) -> bool:
    """Merges x (+, -, *, /) c per channel into what made x, if it can be."""
    if right.constant is None and name in ('add', 'mul'):
      left, right = right, left
    if right.constant is None or left.constant is not None:
      return False
    tensor, c = self._tensors[left], right.constant.astype(np.float64)
    if (
      y.dtype != np.float32
      or c.ndim not in (0, len(left.shape))
      or sum(size > 1 for size in c.shape) > 1
      # The constant would make the array larger.
      or any(
        n > 1 and n != size
        for n, size in zip(c.shape, left.shape, strict=False)
      )
      or (name == 'div' and not c.all())
    ):
      return False
    if c.ndim:
      c = c.transpose(tensor.axes)
    node = tensor.node
    if left.uses > 1 or node is None or not self._takes(node, c):
      tensor = self._emit('Affine', [tensor.name], y, tensor.axes)
      node = tensor.node
    if node.scale is None:
      node.scale, node.bias = np.ones((), float), np.zeros((), float)
    if name in ('mul', 'div'):
      factor = c if name == 'mul' else 1 / c
      node.scale, node.bias = node.scale * factor, node.bias * factor
    else:
      node.bias = node.bias + (c if name == 'add' else -c)
    self._tensors[y] = Tensor(node.output, tensor.axes, node)
    return True

  def _takes(self, node: Node, c: np.ndarray) -> bool:
    """Whether a node can have this constant put into it."""
    places = [i for i, size in enumerate(c.shape) if size > 1]
    if node.operator == 'Affine':
      pending = np.broadcast_shapes(node.scale.shape, node.bias.shape)
      held = [i for i, size in enumerate(pending) if size > 1]
      return not held or not places or held == places
    return (
      self._fold_norms
      and node.weight_axis is not None
      and places in ([], [node.channel_place])
    )

  def _add_activation(
    self, name: str, y: Value, left: Value, right: Value
  ) -> bool:
    """Writes max(x, 0) and min(max(x, 0), c) as runtimes fuse them."""
    x, c = (right, left) if right.constant is None else (left, right)
    if c.constant is None or c.constant.size != 1:
      return False
    tensor, c = self._tensors[x], c.constant
    if len(tensor.axes) < c.ndim or y.dtype != np.float32:
      return False
    node = tensor.node
    if name == 'max' and c == 0:
      self._emit('Relu', [tensor.name], y, tensor.axes)
      return True
    is_relu = node is not None and node.operator == 'Relu'
    if name == 'min' and x.uses == 1 and is_relu:
      node.operator, bounds = 'Clip', (np.zeros((), y.dtype), c.reshape(()))
      node.inputs += bounds
      self._tensors[y] = tensor
      return True
    return False

  def _add_convert_element_type(self, params, y: Value, x: Value) -> None:
    tensor = self._tensors[x]
    if x.dtype == y.dtype:
      self._alias(tensor, y)
      return
    self._emit('Cast', [tensor.name], y, tensor.axes, to=onnx_type(y.dtype))

  def _add_square(self, params, y: Value, x: Value) -> None:
    tensor = self._tensors[x]
    self._emit('Mul', [tensor.name] * 2, y, tensor.axes)

  def _add_integer_pow(self, params, y: Value, x: Value) -> None:
    tensor, power = self._tensors[x], np.asarray(params['y'], x.dtype)
    self._emit('Pow', [tensor.name, power], y, tensor.axes)

  def _add_log1p(self, params, y: Value, x: Value) -> None:
    tensor, one = self._tensors[x], np.ones((), y.dtype)
    plus = self._emit('Add', [tensor.name, one], y, tensor.axes)
    self._emit('Log', [plus.name], y, tensor.axes)

  def _add_expm1(self, params, y: Value, x: Value) -> None:
    tensor, one = self._tensors[x], np.ones((), y.dtype)
    power = self._emit('Exp', [tensor.name], y, tensor.axes)
    self._emit('Sub', [power.name, one], y, tensor.axes)

  def _add_erfc(self, params, y: Value, x: Value) -> None:
    tensor, one = self._tensors[x], np.ones((), y.dtype)
    erf = self._emit('Erf', [tensor.name], y, tensor.axes)
    self._emit('Sub', [one, erf.name], y, tensor.axes)

  def _add_clamp(self, params, y: Value, *inputs: Value) -> None:
    low, x, high = inputs
    names, axes = self._operands([x, low, high])
    if all(
      c.constant is not None and c.constant.ndim == 0 for c in (low, high)
    ):
      self._emit('Clip', names, y, axes)
      return
    above = self._emit('Max', names[:2], y, axes)
    self._emit('Min', [above.name, names[2]], y, axes)

  def _add_select_n(self, params, y: Value, which: Value, *cases) -> None:
    if which.dtype != bool:
      raise UserError('cannot export a select of more than two cases to ONNX')
    (test, no, yes), axes = self._operands([which, *cases])
    self._emit('Where', [test, yes, no], y, axes)

  # Products and pooling.

  def _add_conv_general_dilated(self, params, y: Value, x: Value, kernel):
    if (
      kernel.constant is None
      or params['batch_group_count'] != 1
      or any(d != 1 for d in params['lhs_dilation'])
    ):
      raise UserError(
        'cannot export a transposed convolution, or one whose kernel depends '
        'on the images, to ONNX'
      )
    numbers = params['dimension_numbers']
    tensor = self._arranged(self._tensors[x], numbers.lhs_spec)
    weight = kernel.constant.transpose(numbers.rhs_spec)
    low, high = zip(*params['padding'], strict=True)
    made = self._emit(
      'Conv',
      [tensor.name, weight],
      y,
      numbers.out_spec,
      strides=list(params['window_strides']),
      dilations=list(params['rhs_dilation']),
      group=params['feature_group_count'],
      kernel_shape=list(weight.shape[2:]),
      pads=[*low, *high],
    )
    made.node.weight_axis, made.node.channel_place = 0, 1

  def _add_dot_general(self, params, y: Value, left: Value, right: Value):
    contract, batch = params['dimension_numbers']
    if not any(batch) and len(contract[0]) == 1:
      sides = [(left, contract[0][0]), (right, contract[1][0])]
      for k in (1, 0):
        weight = sides[k][0].constant
        if weight is not None and weight.ndim == 2:
          self._matmul(*sides[1 - k], *sides[k], y, weight_first=k == 0)
          return
    letters = iter('abcdefghijklmnopqrstuvwxyz')
    names = [[''] * len(x.shape) for x in (left, right)]
    for pair in (*zip(*batch, strict=True), *zip(*contract, strict=True)):
      names[0][pair[0]] = names[1][pair[1]] = next(letters)
    names = [[n or next(letters) for n in side] for side in names]
    kept = [names[0][i] for i in batch[0]]
    for side, summed, batched in zip(names, contract, batch, strict=True):
      kept += [n for i, n in enumerate(side) if i not in (*summed, *batched)]
    equation = f'{"".join(names[0])},{"".join(names[1])}->{"".join(kept)}'
    inputs = [self._natural(x) for x in (left, right)]
    self._emit('Einsum', inputs, y, equation=equation)

  def _matmul(self, x, axis, matrix, contracted, y, *, weight_first) -> None:
    """Multiplies one axis of an array with a constant matrix."""
    tensor, rank = self._tensors[x], len(x.shape)
    weight = matrix.constant
    if tensor.place(axis) < rank - 2:
      others = [a for a in tensor.axes if a != axis]
      tensor = self._arranged(tensor, [*others, axis])
    place = tensor.place(axis)
    # Axes of the result: those left of x in order, the matrix's new one before
    # or after them.
    shift = 1 if weight_first else 0
    new = {
      a: i + shift for i, a in enumerate(a for a in range(rank) if a != axis)
    }
    new[axis] = 0 if weight_first else rank - 1
    axes = [new[a] for a in tensor.axes]
    if place == rank - 1:
      inputs = [tensor.name, weight if contracted == 0 else weight.T]
      weight_axis = 1
    else:
      inputs = [weight if contracted == 1 else weight.T, tensor.name]
      weight_axis = 0
    made = self._emit('MatMul', inputs, y, axes)
    made.node.weight_axis, made.node.channel_place = weight_axis, place

  def _add_reduce_window_max(self, params, y: Value, x: Value) -> None:
    self._pool('MaxPool', params, y, x)

  def _add_reduce_window_sum(self, params, y: Value, x: Value) -> None:
    mean = self._pool('AveragePool', params, y, x, count_include_pad=1)
    count = math.prod(params['window_dimensions'])
    self._emit('Mul', [mean.name, np.asarray(count, y.dtype)], y, mean.axes)

  def _pool(self, operator: str, params, y: Value, x: Value, **attributes):
    if any(d != 1 for d in params['base_dilation']):
      raise UserError('cannot export pooling between pixels to ONNX')
    window, strides = params['window_dimensions'], params['window_strides']
    each_axis = zip(window, strides, params['padding'], strict=True)
    moved = [i for i, way in enumerate(each_axis) if way != (1, 1, (0, 0))]
    still = [i for i in range(len(window)) if i not in moved]
    if len(still) < 2:
      raise UserError('cannot export pooling over the channels to ONNX')
    tensor = self._tensors[x]
    # ONNX pools all axes but the first two.
    if set(tensor.axes[:2]) & set(moved):
      tensor = self._arranged(
        tensor, [still[0], still[-1], *sorted({*still[1:-1], *moved})]
      )
    spatial = tensor.axes[2:]
    dilations = [params['window_dilation'][i] for i in spatial]
    if any(d != 1 for d in dilations):
      attributes['dilations'] = dilations
    return self._emit(
      operator,
      [tensor.name],
      y,
      tensor.axes,
      kernel_shape=[window[i] for i in spatial],
      strides=[strides[i] for i in spatial],
      pads=[params['padding'][i][side] for side in (0, 1) for i in spatial],
      **attributes,
    )
