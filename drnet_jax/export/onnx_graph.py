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
from collections.abc import Callable, Sequence

import jax
import numpy as np
import onnx

from drnet_jax.errors import UserError
from drnet_jax.export.onnx_builder import Builder, Node, onnx_type
from drnet_jax.export.traced import Operation, Program, Value, is_symbolic

# Of the primitives that take arrays of one shape, operators one after another;
# 'Add:1' has a constant as its second input.
_ELEMENTWISE = {
  name: name.title()
  for name in (
    'abs add and ceil cos div erf exp floor log max min mul neg not or pow '
    'sign sin sqrt sub tanh'
  ).split()
} | {
  'eq': 'Equal',
  'expm1': 'Exp Sub:1',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'log1p': 'Add:1 Log',
  'logistic': 'Sigmoid',
  'lt': 'Less',
  'ne': 'Equal Not',
  'rsqrt': 'Sqrt Reciprocal',
}
_REDUCTIONS = {
  'reduce_max': 'ReduceMax',
  'reduce_min': 'ReduceMin',
  'reduce_prod': 'ReduceProd',
  'reduce_sum': 'ReduceSum',
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
  program = Program(function, image)
  graph = _Graph(program, fold_norms=fold_norms)
  for operation in program.operations:
    graph.add(operation)
  return graph.finish(output_name)


class _Graph(Builder):
  """Writes every operation of a program.

  `_add_<primitive>` is found by its name, and called with the parameters, the
  array to make (several, of a split) and the arrays to read.
  """

  def add(self, operation: Operation) -> None:
    """Writes the operators of one operation."""
    name, params, inputs = operation.name, operation.params, operation.inputs
    y = operation.outputs if name == 'split' else operation.outputs[0]
    if name in _AFFINE and self._add_affine(name, y, *inputs):
      return
    if name in ('max', 'min') and self._add_activation(name, y, *inputs):
      return
    if name in _ELEMENTWISE:
      operands, axes = self._operands(inputs)
      for step in _ELEMENTWISE[name].split():
        operator, _, second = step.partition(':')
        if second:
          operands.append(np.asarray(int(second), y.dtype))
        operands = [self._emit(operator, operands, y, axes)]
    elif name in _REDUCTIONS:
      self._reduce(_REDUCTIONS[name], params, y, *inputs)
    elif handler := getattr(self, f'_add_{name}', None):
      handler(params, y, *inputs)
    else:
      shapes = ', '.join(str(list(map(str, x.shape))) for x in inputs)
      raise UserError(
        f'cannot export the JAX primitive {name!r} (on {shapes}) to ONNX; '
        'write that part of the network with other operations, or export '
        'StableHLO only'
      )

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
      tensor = self._emit('Affine', [tensor], y)
      node = tensor.node
    if node.scale is None:
      node.scale, node.bias = np.ones((), float), np.zeros((), float)
    if name in ('mul', 'div'):
      factor = c if name == 'mul' else 1 / c
      node.scale, node.bias = node.scale * factor, node.bias * factor
    else:
      node.bias = node.bias + (c if name == 'add' else -c)
    self._tensors[y] = tensor
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
    x, limit = (right, left) if right.constant is None else (left, right)
    if limit.constant is None or limit.constant.size != 1:
      return False
    tensor, c = self._tensors[x], limit.constant
    if len(tensor.axes) < c.ndim or y.dtype != np.float32:
      return False
    node = tensor.node
    if name == 'max' and c == 0:
      self._emit('Relu', [tensor], y)
      return True
    is_relu = node is not None and node.operator == 'Relu'
    if name == 'min' and x.uses == 1 and is_relu:
      node.operator = 'Clip'
      node.inputs += [np.zeros((), y.dtype), c.reshape(())]
      self._tensors[y] = tensor
      return True
    return False

  def _add_convert_element_type(self, params, y: Value, x: Value) -> None:
    if x.dtype == y.dtype:
      self._alias(y, self._tensors[x])
    else:
      self._emit('Cast', [self._tensors[x]], y, to=onnx_type(y.dtype))

  def _add_square(self, params, y: Value, x: Value) -> None:
    self._emit('Mul', [self._tensors[x]] * 2, y)

  def _add_integer_pow(self, params, y: Value, x: Value) -> None:
    power = np.asarray(params['y'], x.dtype)
    self._emit('Pow', [self._tensors[x], power], y)

  def _add_erfc(self, params, y: Value, x: Value) -> None:
    erf = self._emit('Erf', [self._tensors[x]], y)
    self._emit('Sub', [np.ones((), y.dtype), erf], y)

  def _add_clamp(self, params, y: Value, *inputs: Value) -> None:
    low, x, high = inputs
    operands, axes = self._operands([x, low, high])
    if all(
      c.constant is not None and c.constant.ndim == 0 for c in (low, high)
    ):
      self._emit('Clip', operands, y, axes)
      return
    above = self._emit('Max', operands[:2], y, axes)
    self._emit('Min', [above, operands[2]], y, axes)

  def _add_select_n(self, params, y: Value, which: Value, *cases) -> None:
    if which.dtype != bool:
      raise UserError('cannot export a select of more than two cases to ONNX')
    (test, no, yes), axes = self._operands([which, *cases])
    self._emit('Where', [test, yes, no], y, axes)

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
      [tensor, weight],
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
    contracting, batch = params['dimension_numbers']
    if not any(batch) and len(contracting[0]) == 1:
      sides = [(left, contracting[0][0]), (right, contracting[1][0])]
      for k in (1, 0):
        weight = sides[k][0].constant
        if weight is not None and weight.ndim == 2:
          contracted = sides[k][1]
          self._matmul(*sides[1 - k], weight, contracted, y, k == 0)
          return
    letters = iter('abcdefghijklmnopqrstuvwxyz')
    names = [[''] * len(x.shape) for x in (left, right)]
    for pair in (*zip(*batch, strict=True), *zip(*contracting, strict=True)):
      names[0][pair[0]] = names[1][pair[1]] = next(letters)
    names = [[n or next(letters) for n in side] for side in names]
    kept = [names[0][i] for i in batch[0]]
    for side, summed, batched in zip(names, contracting, batch, strict=True):
      kept += [n for i, n in enumerate(side) if i not in (*summed, *batched)]
    equation = f'{"".join(names[0])},{"".join(names[1])}->{"".join(kept)}'
    inputs = [self._natural(x) for x in (left, right)]
    self._emit('Einsum', inputs, y, range(len(y.shape)), equation=equation)

  def _matmul(self, x, axis, weight, contracted, y, weight_first) -> None:
    """Multiplies one axis of an array with a constant matrix."""
    tensor, rank = self._tensors[x], len(x.shape)
    others = [a for a in tensor.axes if a != axis]
    if tensor.place(axis) < rank - 2:
      tensor = self._arranged(tensor, [*others, axis])
    place = tensor.place(axis)
    # Axes of the result: those left of x in order, the matrix's new one before
    # or after them.
    first = int(weight_first)
    new = {a: i for i, a in enumerate(sorted(others), first)}
    new[axis] = 0 if weight_first else rank - 1
    axes = [new[a] for a in tensor.axes]
    if place == rank - 1:
      inputs = [tensor, weight if contracted == 0 else weight.T]
      weight_axis = 1
    else:
      inputs = [weight if contracted == 1 else weight.T, tensor]
      weight_axis = 0
    made = self._emit('MatMul', inputs, y, axes)
    made.node.weight_axis, made.node.channel_place = weight_axis, place

  def _add_reduce_window_max(self, params, y: Value, x: Value) -> None:
    self._pool('MaxPool', params, y, x)

  def _add_reduce_window_sum(self, params, y: Value, x: Value) -> None:
    mean = self._pool('AveragePool', params, y, x, count_include_pad=1)
    count = math.prod(params['window_dimensions'])
    self._emit('Mul', [mean, np.asarray(count, y.dtype)], y)

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
      [tensor],
      y,
      kernel_shape=[window[i] for i in spatial],
      strides=[strides[i] for i in spatial],
      pads=[params['padding'][i][side] for side in (0, 1) for i in spatial],
      **attributes,
    )

  def _add_transpose(self, params, y: Value, x: Value) -> None:
    tensor = self._tensors[x]
    new_of_old = np.argsort(params['permutation'])
    self._alias(y, tensor, [int(new_of_old[axis]) for axis in tensor.axes])

  def _add_reshape(self, params, y: Value, x: Value, *_) -> None:
    if sum(map(is_symbolic, y.shape)) > 1:
      raise UserError('cannot export a reshape with two unknown sizes to ONNX')
    target = [-1 if is_symbolic(n) else n for n in y.shape]
    self._emit('Reshape', [self._natural(x), np.asarray(target, np.int64)], y)

  def _add_squeeze(self, params, y: Value, x: Value) -> None:
    tensor, gone = self._tensors[x], params['dimensions']
    places = np.asarray([tensor.place(axis) for axis in gone])
    self._emit('Squeeze', [tensor, places], y, _without(tensor.axes, gone))

  def _add_broadcast_in_dim(self, params, y: Value, x: Value, *_) -> None:
    old = dict(zip(params['broadcast_dimensions'], x.shape, strict=True))
    natural = self._natural(x)
    new_axes = np.asarray([i for i in range(len(y.shape)) if i not in old])
    if len(new_axes):
      natural = self._emit('Unsqueeze', [natural, new_axes], y)
    # A target of 1 leaves an axis as it is.
    target = [1 if old.get(i, 1) == n else n for i, n in enumerate(y.shape)]
    if any(map(is_symbolic, target)):
      raise UserError('cannot export an array repeated along the batch to ONNX')
    if any(n != 1 for n in target):
      self._emit('Expand', [natural, np.asarray(target)], y)
    elif not len(new_axes):
      self._alias(y, self._tensors[x])

  def _add_concatenate(self, params, y: Value, *inputs: Value) -> None:
    for x in inputs:
      if x.constant is not None and any(map(is_symbolic, x.shape)):
        raise UserError(
          'cannot export a constant joined to the images (concatenate) to ONNX'
        )
    operands, axes = self._operands(inputs)
    place = axes.index(params['dimension'])
    self._emit('Concat', operands, y, axes, axis=place)

  def _add_stack(self, params, y: Value, *inputs: Value) -> None:
    axis = params['axis']
    parts = [
      self._emit('Unsqueeze', [self._natural(x), np.asarray([axis])], y)
      for x in inputs
    ]
    self._emit('Concat', parts, y, axis=axis)

  def _add_split(self, params, parts: list[Value], x: Value) -> None:
    axis, start = params['axis'], 0
    for size, y in zip(params['sizes'], parts, strict=True):
      self._cut(x, y, [axis], [start], [start + size], [1])
      start += size

  def _add_slice(self, params, y: Value, x: Value) -> None:
    axes = [i for i, n in enumerate(x.shape) if not is_symbolic(n)]
    strides = params['strides'] or [1] * len(x.shape)
    bounds = (params['start_indices'], params['limit_indices'], strides)
    self._cut(x, y, axes, *([of[axis] for axis in axes] for of in bounds))

  def _cut(self, x: Value, y: Value, axes, starts, ends, steps) -> None:
    tensor = self._tensors[x]
    places = [tensor.place(axis) for axis in axes]
    bounds = map(np.asarray, (starts, ends, places, steps))
    self._emit('Slice', [tensor, *bounds], y)

  def _add_gather(self, params, y: Value, x: Value, indices: Value) -> None:
    """Indexing with constants, an axis at a time: x[:, ::2, ::2], x[:, 0]."""
    numbers = params['dimension_numbers']
    axes = numbers.start_index_map
    grid = indices.constant
    each = [] if grid is None else np.moveaxis(grid.astype(np.int64), -1, 0)
    picks = [_along_one_axis(along) for along in each]
    turned = [axis for axis, _ in picks if axis is not None]
    if (
      grid is None
      or tuple(numbers.collapsed_slice_dims) != tuple(sorted(axes))
      or numbers.operand_batching_dims
      or any(pick is None for _, pick in picks)
      or sorted(turned) != list(range(grid.ndim - 1))
      or any(
        pick.min() < 0 or pick.max() >= x.shape[axis]
        for axis, (_, pick) in zip(axes, picks, strict=True)
      )
    ):
      raise UserError('cannot export indexing of this kind to ONNX')
    tensor = self._tensors[x]
    kept = [i for i in range(len(x.shape)) if i not in axes]
    # Where each axis of x goes in y; those indexed by a number go nowhere.
    goes = dict(zip(kept, numbers.offset_dims, strict=True))
    free = [i for i in range(len(y.shape)) if i not in numbers.offset_dims]
    for axis, (grid_axis, pick) in zip(axes, picks, strict=True):
      left = list(tensor.axes)
      place = left.index(axis)
      if grid_axis is None:
        left.remove(axis)
      else:
        goes[axis] = free[grid_axis]
      tensor = self._add_node('Gather', [tensor, pick], left, axis=place)
    self._alias(y, tensor, [goes[axis] for axis in tensor.axes])

  def _add_pad(self, params, y: Value, x: Value, fill: Value) -> None:
    config = params['padding_config']
    if any(interior for _, _, interior in config) or fill.constant is None:
      raise UserError('cannot export padding between pixels to ONNX')
    tensor = self._tensors[x]
    if not any(low or high for low, high, _ in config):
      self._alias(y, tensor)
      return
    pads = [config[axis][side] for side in (0, 1) for axis in tensor.axes]
    self._emit('Pad', [tensor, np.asarray(pads), fill.constant], y)

  def _reduce(self, operator: str, params, y: Value, x: Value) -> None:
    tensor, gone = self._tensors[x], params['axes']
    if any(is_symbolic(x.shape[axis]) for axis in gone):
      raise UserError('cannot export a reduction over the batch to ONNX')
    places = np.asarray(sorted(tensor.place(axis) for axis in gone))
    axes = _without(tensor.axes, gone)
    self._emit(operator, [tensor, places], y, axes, keepdims=0)

  def _add_argmax(self, params, y: Value, x: Value) -> None:
    tensor, gone = self._tensors[x], params['axes']
    axes, place = _without(tensor.axes, gone), tensor.place(gone[0])
    found = self._emit('ArgMax', [tensor], y, axes, axis=place, keepdims=0)
    self._emit('Cast', [found], y, to=onnx_type(y.dtype))


def _along_one_axis(x: np.ndarray) -> tuple[int | None, np.ndarray | None]:
  """The one axis along which an array varies, and its values there.

  The axis is None for a single number, the values are None if there are more
  axes.
  """
  if x.ndim == 0:
    return None, x
  for axis in range(x.ndim):
    values = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    if (values == values[0]).all() and (x.shape[axis] > 1 or x.ndim == 1):
      return axis, values[0]
  return None, None


def _without(axes: Sequence[int], gone: Sequence[int]) -> list[int]:
  """The axes that are left, counted anew."""
  left = [axis for axis in axes if axis not in gone]
  return [sorted(left).index(axis) for axis in left]
