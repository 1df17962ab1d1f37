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

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from drnet_jax.errors import UserError
from drnet_jax.export.traced import (
  Operation,
  Program,
  Value,
  is_symbolic,
  trace,
)

_OPSET = 18
_IR_VERSION = 9  # the first that has opset 18's types; old runtimes read it

_TYPES = {
  'float32': TensorProto.FLOAT,
  'float64': TensorProto.DOUBLE,
  'int32': TensorProto.INT32,
  'int64': TensorProto.INT64,
  'int8': TensorProto.INT8,
  'uint8': TensorProto.UINT8,
  'bool': TensorProto.BOOL,
}
_UNARY = {
  'abs': 'Abs',
  'ceil': 'Ceil',
  'cos': 'Cos',
  'erf': 'Erf',
  'exp': 'Exp',
  'floor': 'Floor',
  'log': 'Log',
  'logistic': 'Sigmoid',
  'neg': 'Neg',
  'not': 'Not',
  'sign': 'Sign',
  'sin': 'Sin',
  'sqrt': 'Sqrt',
  'tanh': 'Tanh',
}
_BINARY = {
  'add': 'Add',
  'and': 'And',
  'div': 'Div',
  'eq': 'Equal',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'lt': 'Less',
  'max': 'Max',
  'min': 'Min',
  'mul': 'Mul',
  'or': 'Or',
  'pow': 'Pow',
  'sub': 'Sub',
}
_REDUCTIONS = {
  'reduce_sum': 'ReduceSum',
  'reduce_max': 'ReduceMax',
  'reduce_min': 'ReduceMin',
  'reduce_prod': 'ReduceProd',
}
_AFFINE = {'add', 'sub', 'mul', 'div'}


def convert(
  function: Callable,
  image: jax.ShapeDtypeStruct,
  *,
  input_name: str,
  output_name: str,
  fold_norms: bool = True,
) -> onnx.ModelProto:
  """Traces a function and writes it as an ONNX model with a dynamic batch.

  Args:
    function: from one array [B, ...] to one array [B, ...]. What it closes
      over becomes weights.
    image: shape and type of one element of the batch, without B.
    input_name: of the model's input.
    output_name: of the model's output.
    fold_norms: see the module.

  Returns:
    The model; its weights are inside.

  Raises:
    UserError: the function needs something that has no counterpart here; the
      message names it.
  """
  program = trace(function, image)
  graph = _Graph(program, input_name, fold_norms=fold_norms)
  for operation in program.operations:
    graph.add(operation)
  return graph.finish(input_name, output_name)


@dataclasses.dataclass(eq=False)
class _Tensor:
  """An array in the ONNX graph.

  Attributes:
    name: there.
    axes: `axes[i]` is the axis of the traced array that is stored at place i.
    node: that makes it; None for the input.
    value: the traced array.
  """

  name: str
  axes: tuple[int, ...]
  node: '_Node | None'
  value: Value

  def place(self, axis: int) -> int:
    """Where a traced axis is stored."""
    return self.axes.index(axis)


@dataclasses.dataclass(eq=False)
class _Node:
  """An ONNX operator to be written.

  Attributes:
    operator: its type; 'Affine' stands for x * scale + bias.
    inputs: names of tensors, or constants.
    output: name.
    attributes: of the operator.
    weight_axis: for a product with a weight as its last or only constant
      input, the axis of the weight that is the output's channel; else None.
    channel_place: where that channel is stored in the output.
    scale, bias: pending, per channel, broadcastable to the output.
  """

  operator: str
  inputs: list[Any]
  output: str
  attributes: dict[str, Any]
  weight_axis: int | None = None
  channel_place: int = 0
  scale: np.ndarray | None = None
  bias: np.ndarray | None = None


class _Graph:
  """The ONNX graph under construction."""

  def __init__(self, program: Program, input_name: str, *, fold_norms: bool):
    self._fold_norms = fold_norms
    self._nodes: list[_Node] = []
    self._count = 0
    self._program = program
    rank = len(program.input.shape)
    first = _Tensor(input_name, tuple(range(rank)), None, program.input)
    self._tensors: dict[Value, _Tensor] = {program.input: first}
    if rank == 4 and any(
      o.name == 'conv_general_dilated' for o in program.operations
    ):
      # While the pixels are still bytes: a quarter of the memory to move.
      self._tensors[program.input] = self._arranged(first, (0, 3, 1, 2))

  def add(self, operation: Operation) -> None:
    """Writes the operators of one operation."""
    name = operation.name
    if name in _AFFINE and self._add_affine(operation):
      return
    if name in ('max', 'min') and self._add_activation(operation):
      return
    if name in _UNARY:
      self._elementwise(operation, _UNARY[name])
    elif name in _BINARY:
      self._elementwise(operation, _BINARY[name])
    elif name in _REDUCTIONS:
      self._reduce(operation)
    elif handler := getattr(self, f'_add_{name}', None):
      handler(operation)
    else:
      shapes = ', '.join(str(list(map(str, x.shape))) for x in operation.inputs)
      raise UserError(
        f'cannot export the JAX primitive {name!r} (on {shapes}) to ONNX; '
        'write that part of the network with other operations, or export '
        'StableHLO only'
      )

  def finish(self, input_name: str, output_name: str) -> onnx.ModelProto:
    """The model."""
    output = self._program.output
    if output.constant is not None:
      raise UserError('the output does not depend on the images')
    last = self._arranged(
      self._tensors[output], tuple(range(len(output.shape)))
    )
    self._emit('Identity', [last.name], output, last.axes, name=output_name)
    nodes, initializers = [], {}

    def named(x, node: _Node, i: int) -> str:
      if isinstance(x, str):
        return x
      name = f'{node.output}_c{i}'
      initializers[name] = numpy_helper.from_array(
        np.asarray(x, order='C'), name
      )
      return name

    for node in self._nodes:
      for operator, inputs, out, attributes in _written(node):
        nodes.append(
          helper.make_node(
            operator,
            [
              named(x, dataclasses.replace(node, output=out), i)
              for i, x in enumerate(inputs)
            ],
            [out],
            name=out,
            **attributes,
          )
        )
    program = self._program
    graph = helper.make_graph(
      nodes,
      'drnet_jax',
      [_info(input_name, program.input)],
      [_info(output_name, output)],
      list(initializers.values()),
    )
    model = helper.make_model(
      graph,
      producer_name='drnet_jax',
      opset_imports=[helper.make_opsetid('', _OPSET)],
      ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model

  # Bookkeeping.

  def _emit(
    self, operator, inputs, value: Value, axes, *, name=None, **attributes
  ) -> _Tensor:
    """Adds a node and says which traced array it makes, in which order."""
    node = _Node(
      operator, list(inputs), name or self._fresh(operator), attributes
    )
    self._nodes.append(node)
    tensor = _Tensor(node.output, tuple(axes), node, value)
    self._tensors[value] = tensor
    return tensor

  def _alias(self, tensor: _Tensor, value: Value) -> None:
    """Gives an array that is already there to another value.

    Without its node: what is put into that would show in both.
    """
    self._tensors[value] = _Tensor(tensor.name, tensor.axes, None, value)

  def _fresh(self, operator: str) -> str:
    self._count += 1
    return f'{operator.lower()}_{self._count}'

  def _arranged(self, tensor: _Tensor, axes: Sequence[int]) -> _Tensor:
    """The same array stored in this order of axes."""
    axes = tuple(axes)
    if tensor.axes == axes:
      return tensor
    perm = [tensor.axes.index(axis) for axis in axes]
    node = _Node('Transpose', [tensor.name], self._fresh('t'), {'perm': perm})
    self._nodes.append(node)
    return _Tensor(node.output, axes, node, tensor.value)

  def _natural(self, value: Value):
    """A name (or constant) whose axes are stored as traced."""
    if value.constant is not None:
      return value.constant
    tensor = self._tensors[value]
    return self._arranged(tensor, tuple(range(len(value.shape)))).name

  def _operands(self, inputs: Sequence[Value]):
    """Names or constants of arrays to combine, all in one order; the order."""
    rank = max(len(x.shape) for x in inputs)
    axes = next(
      self._tensors[x].axes
      for x in inputs
      if x.constant is None and len(x.shape) == rank
    )
    names = []
    for x in inputs:
      if x.constant is not None:
        c = x.constant
        names.append(c if c.ndim == 0 else c.transpose(axes))
      elif len(x.shape) == rank:
        names.append(self._arranged(self._tensors[x], axes).name)
      else:
        names.append(self._tensors[x].name)  # a scalar
    return names, axes

  # Elementwise operations.

  def _elementwise(self, operation: Operation, operator: str) -> None:
    names, axes = self._operands(operation.inputs)
    self._emit(operator, names, operation.outputs[0], axes)

  def _add_affine(self, operation: Operation) -> bool:
    """Merges x (+, -, *, /) c per channel into what made x, if it can be."""
    left, right = operation.inputs
    if right.constant is None and operation.name in ('add', 'mul'):
      left, right = right, left
    if right.constant is None or left.constant is not None:
      return False
    (output,) = operation.outputs
    tensor, c = self._tensors[left], right.constant.astype(np.float64)
    if (
      output.dtype != np.float32
      or c.ndim not in (0, len(left.shape))
      or sum(size > 1 for size in c.shape) > 1
      # The constant would make the array larger.
      or any(
        n > 1 and n != size
        for n, size in zip(c.shape, left.shape, strict=False)
      )
      or (operation.name == 'div' and not c.all())
    ):
      return False
    if c.ndim:
      c = c.transpose(tensor.axes)
    node = tensor.node
    if left.uses > 1 or node is None or not self._takes(node, c):
      tensor = self._emit('Affine', [tensor.name], output, tensor.axes)
      node = tensor.node
    if node.scale is None:
      node.scale, node.bias = np.ones((), float), np.zeros((), float)
    if operation.name in ('mul', 'div'):
      factor = c if operation.name == 'mul' else 1 / c
      node.scale, node.bias = node.scale * factor, node.bias * factor
    else:
      node.bias = node.bias + (c if operation.name == 'add' else -c)
    self._tensors[output] = _Tensor(node.output, tensor.axes, node, output)
    return True

  def _takes(self, node: _Node, c: np.ndarray) -> bool:
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

  def _add_activation(self, operation: Operation) -> bool:
    """Writes max(x, 0) and min(max(x, 0), c) as runtimes fuse them."""
    constants = [x for x in operation.inputs if x.constant is not None]
    others = [x for x in operation.inputs if x.constant is None]
    (y,) = operation.outputs
    if len(constants) != 1 or constants[0].constant.size != 1:
      return False
    tensor, c = self._tensors[others[0]], constants[0].constant
    if len(tensor.axes) < c.ndim or y.dtype != np.float32:
      return False
    node = tensor.node
    if operation.name == 'max' and c == 0:
      self._emit('Relu', [tensor.name], y, tensor.axes)
      return True
    if (
      operation.name == 'min'
      and others[0].uses == 1
      and node is not None
      and node.operator == 'Relu'
    ):
      node.operator, bounds = 'Clip', (np.zeros((), y.dtype), c.reshape(()))
      node.inputs += bounds
      self._tensors[y] = dataclasses.replace(tensor, value=y)
      return True
    return False

  def _add_convert_element_type(self, operation: Operation) -> None:
    (x,), (y,) = operation.inputs, operation.outputs
    tensor = self._tensors[x]
    if x.dtype == y.dtype:
      self._alias(tensor, y)
      return
    self._emit('Cast', [tensor.name], y, tensor.axes, to=_onnx_type(y.dtype))

  def _add_rsqrt(self, operation: Operation) -> None:
    (y,) = operation.outputs
    names, axes = self._operands(operation.inputs)
    root = self._emit('Sqrt', names, y, axes)
    self._emit('Reciprocal', [root.name], y, axes)

  def _add_square(self, operation: Operation) -> None:
    names, axes = self._operands(operation.inputs)
    self._emit('Mul', names * 2, operation.outputs[0], axes)

  def _add_integer_pow(self, operation: Operation) -> None:
    names, axes = self._operands(operation.inputs)
    power = np.asarray(operation.params['y'], operation.inputs[0].dtype)
    self._emit('Pow', [*names, power], operation.outputs[0], axes)

  def _add_log1p(self, operation: Operation) -> None:
    names, axes = self._operands(operation.inputs)
    (y,) = operation.outputs
    plus = self._emit('Add', [*names, np.ones((), y.dtype)], y, axes)
    self._emit('Log', [plus.name], y, axes)

  def _add_expm1(self, operation: Operation) -> None:
    names, axes = self._operands(operation.inputs)
    (y,) = operation.outputs
    power = self._emit('Exp', names, y, axes)
    self._emit('Sub', [power.name, np.ones((), y.dtype)], y, axes)

  def _add_erfc(self, operation: Operation) -> None:
    names, axes = self._operands(operation.inputs)
    (y,) = operation.outputs
    erf = self._emit('Erf', names, y, axes)
    self._emit('Sub', [np.ones((), y.dtype), erf.name], y, axes)

  def _add_ne(self, operation: Operation) -> None:
    names, axes = self._operands(operation.inputs)
    equal = self._emit('Equal', names, operation.outputs[0], axes)
    self._emit('Not', [equal.name], operation.outputs[0], axes)

  def _add_clamp(self, operation: Operation) -> None:
    low, x, high = operation.inputs
    (y,) = operation.outputs
    names, axes = self._operands([x, low, high])
    if all(
      c.constant is not None and c.constant.ndim == 0 for c in (low, high)
    ):
      self._emit('Clip', names, y, axes)
      return
    above = self._emit('Max', names[:2], y, axes)
    self._emit('Min', [above.name, names[2]], y, axes)

  def _add_select_n(self, operation: Operation) -> None:
    which, *cases = operation.inputs
    if which.dtype != bool:
      raise UserError('cannot export a select of more than two cases to ONNX')
    (test, no, yes), axes = self._operands([which, *cases])
    self._emit('Where', [test, yes, no], operation.outputs[0], axes)

  # Shapes.

  def _add_transpose(self, operation: Operation) -> None:
    (x,), (y,) = operation.inputs, operation.outputs
    tensor = self._tensors[x]
    new_of_old = np.argsort(operation.params['permutation'])
    axes = tuple(int(new_of_old[axis]) for axis in tensor.axes)
    self._tensors[y] = _Tensor(tensor.name, axes, None, y)

  def _add_reshape(self, operation: Operation) -> None:
    (y,) = operation.outputs
    name = self._natural(operation.inputs[0])
    self._emit('Reshape', [name, _target(y.shape)], y, range(len(y.shape)))

  def _add_squeeze(self, operation: Operation) -> None:
    (x,), (y,) = operation.inputs, operation.outputs
    tensor, gone = self._tensors[x], operation.params['dimensions']
    places = np.asarray([tensor.place(axis) for axis in gone])
    axes = _renumbered([a for a in tensor.axes if a not in gone])
    self._emit('Squeeze', [tensor.name, places], y, axes)

  def _add_expand_dims(self, operation: Operation) -> None:
    self._add_reshape(operation)

  def _add_broadcast_in_dim(self, operation: Operation) -> None:
    x, (y,) = operation.inputs[0], operation.outputs
    where = operation.params['broadcast_dimensions']
    old = dict(zip(where, x.shape, strict=True))
    name = self._natural(x)
    new_axes = np.asarray([i for i in range(len(y.shape)) if i not in old])
    if len(new_axes):
      name = self._emit(
        'Unsqueeze', [name, new_axes], y, range(len(y.shape))
      ).name
    grown = [old.get(i, 1) != size for i, size in enumerate(y.shape)]
    if any(g and is_symbolic(n) for g, n in zip(grown, y.shape, strict=True)):
      raise UserError('cannot export an array repeated along the batch to ONNX')
    if any(grown):
      # A target of 1 leaves an axis as it is.
      target = np.asarray(
        [n if g else 1 for g, n in zip(grown, y.shape, strict=True)]
      )
      self._emit('Expand', [name, target], y, range(len(y.shape)))
    elif not len(new_axes):
      self._alias(self._tensors[x], y)

  def _add_concatenate(self, operation: Operation) -> None:
    for x in operation.inputs:
      if x.constant is not None and any(map(is_symbolic, x.shape)):
        raise UserError(
          'cannot export a constant joined to the images (concatenate) to ONNX'
        )
    names, axes = self._operands(operation.inputs)
    place = axes.index(operation.params['dimension'])
    self._emit('Concat', names, operation.outputs[0], axes, axis=place)

  def _add_stack(self, operation: Operation) -> None:
    (y,) = operation.outputs
    axis = operation.params['axis']
    parts = [
      self._emit(
        'Unsqueeze',
        [self._natural(x), np.asarray([axis])],
        y,
        range(len(y.shape)),
      ).name
      for x in operation.inputs
    ]
    self._emit('Concat', parts, y, range(len(y.shape)), axis=axis)

  def _add_split(self, operation: Operation) -> None:
    tensor = self._tensors[operation.inputs[0]]
    axis, start = operation.params['axis'], 0
    for size, y in zip(
      operation.params['sizes'], operation.outputs, strict=True
    ):
      self._cut(tensor, y, [axis], [start], [start + size], [1])
      start += size

  def _add_slice(self, operation: Operation) -> None:
    (x,), (y,) = operation.inputs, operation.outputs
    params = operation.params
    axes = [i for i, n in enumerate(x.shape) if not is_symbolic(n)]
    strides = params['strides'] or [1] * len(x.shape)
    starts, ends, steps = (
      [bounds[axis] for axis in axes]
      for bounds in (params['start_indices'], params['limit_indices'], strides)
    )
    self._cut(self._tensors[x], y, axes, starts, ends, steps)

  def _add_gather(self, operation: Operation) -> None:
    """Indexing with constants, an axis at a time: x[:, ::2, ::2], x[:, 0]."""
    x, indices = operation.inputs
    (y,) = operation.outputs
    numbers = operation.params['dimension_numbers']
    axes = numbers.start_index_map
    grid = indices.constant
    picks = [] if grid is None else [_along_one_axis(g) for g in _last(grid)]
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
    name, left = tensor.name, list(tensor.axes)
    for axis, (grid_axis, pick) in zip(axes, picks, strict=True):
      node = _Node(
        'Gather',
        [name, pick],
        self._fresh('gather'),
        {'axis': left.index(axis)},
      )
      self._nodes.append(node)
      name = node.output
      if grid_axis is None:
        left.remove(axis)
      else:
        goes[axis] = free[grid_axis]
    self._tensors[y] = _Tensor(name, tuple(goes[a] for a in left), None, y)

  def _cut(self, tensor, y, axes, starts, ends, steps) -> None:
    places = [tensor.place(axis) for axis in axes]
    self._emit(
      'Slice',
      [tensor.name, *(np.asarray(v) for v in (starts, ends, places, steps))],
      y,
      tensor.axes,
    )

  def _add_pad(self, operation: Operation) -> None:
    (x, fill), (y,) = operation.inputs, operation.outputs
    config = operation.params['padding_config']
    if any(interior for _, _, interior in config) or fill.constant is None:
      raise UserError('cannot export padding between pixels to ONNX')
    tensor = self._tensors[x]
    if not any(low or high for low, high, _ in config):
      self._alias(tensor, y)
      return
    low, high = (
      [config[axis][side] for axis in tensor.axes] for side in (0, 1)
    )
    self._emit(
      'Pad',
      [tensor.name, np.asarray(low + high), fill.constant],
      y,
      tensor.axes,
    )

  # Reductions and products.

  def _reduce(self, operation: Operation) -> None:
    (x,), (y,) = operation.inputs, operation.outputs
    tensor, gone = self._tensors[x], operation.params['axes']
    if any(is_symbolic(x.shape[axis]) for axis in gone):
      raise UserError('cannot export a reduction over the batch to ONNX')
    places = np.asarray(sorted(tensor.place(axis) for axis in gone))
    axes = _renumbered([a for a in tensor.axes if a not in gone])
    operator = _REDUCTIONS[operation.name]
    self._emit(operator, [tensor.name, places], y, axes, keepdims=0)

  def _add_argmax(self, operation: Operation) -> None:
    (x,), (y,) = operation.inputs, operation.outputs
    tensor, gone = self._tensors[x], operation.params['axes']
    axes = _renumbered([a for a in tensor.axes if a not in gone])
    place = tensor.place(gone[0])
    found = self._emit('ArgMax', [tensor.name], y, axes, axis=place, keepdims=0)
    self._emit('Cast', [found.name], y, axes, to=_onnx_type(y.dtype))

  def _add_conv_general_dilated(self, operation: Operation) -> None:
    (x, kernel), (y,) = operation.inputs, operation.outputs
    params = operation.params
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

  def _add_dot_general(self, operation: Operation) -> None:
    (left, right), (y,) = operation.inputs, operation.outputs
    contract, batch = operation.params['dimension_numbers']
    if not any(batch) and len(contract[0]) == 1:
      sides = [(left, contract[0][0]), (right, contract[1][0])]
      constant = [
        x.constant is not None and x.constant.ndim == 2 for x, _ in sides
      ]
      if constant[1]:
        self._matmul(*sides[0], *sides[1], y, weight_first=False)
        return
      if constant[0]:
        self._matmul(*sides[1], *sides[0], y, weight_first=True)
        return
    letters = iter('abcdefghijklmnopqrstuvwxyz')
    names = [[''] * len(x.shape) for x in (left, right)]
    for pair in (*zip(*batch, strict=True), *zip(*contract, strict=True)):
      names[0][pair[0]] = names[1][pair[1]] = next(letters)
    names = [[n or next(letters) for n in side] for side in names]
    kept = [names[0][i] for i in batch[0]]
    for side, contracted, batched in zip(names, contract, batch, strict=True):
      kept += [
        n
        for i, n in enumerate(side)
        if i not in contracted and i not in batched
      ]
    equation = f'{"".join(names[0])},{"".join(names[1])}->{"".join(kept)}'
    inputs = [self._natural(x) for x in (left, right)]
    self._emit('Einsum', inputs, y, range(len(y.shape)), equation=equation)

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

  def _add_reduce_window_max(self, operation: Operation) -> None:
    self._pool(operation, 'MaxPool')

  def _add_reduce_window_sum(self, operation: Operation) -> None:
    (y,) = operation.outputs
    mean = self._pool(operation, 'AveragePool', count_include_pad=1)
    count = math.prod(operation.params['window_dimensions'])
    self._emit('Mul', [mean.name, np.asarray(count, y.dtype)], y, mean.axes)

  def _pool(self, operation: Operation, operator: str, **attributes):
    (x,), (y,) = operation.inputs, operation.outputs
    params = operation.params
    if any(d != 1 for d in params['base_dilation']):
      raise UserError('cannot export pooling between pixels to ONNX')
    window = params['window_dimensions']
    moved = [
      i
      for i, n in enumerate(window)
      if (n, params['window_strides'][i], params['padding'][i])
      != (1, 1, (0, 0))
    ]
    still = [i for i in range(len(window)) if i not in moved]
    if len(still) < 2:
      raise UserError('cannot export pooling over the channels to ONNX')
    # ONNX pools all axes but the first two.
    spatial = still[2:] + moved if len(still) > 2 else moved
    tensor = self._tensors[x]
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
      strides=[params['window_strides'][i] for i in spatial],
      pads=[params['padding'][i][side] for side in (0, 1) for i in spatial],
      **attributes,
    )


def _last(x: np.ndarray) -> list[np.ndarray]:
  """The arrays that lie along the last axis."""
  return [x[..., i].astype(np.int64) for i in range(x.shape[-1])]


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


def _renumbered(axes: list[int]) -> tuple[int, ...]:
  """Axes counted anew after some are gone."""
  return tuple(sorted(axes).index(axis) for axis in axes)


def _target(shape) -> np.ndarray:
  """A shape for Reshape: -1 stands for the one size that is not known."""
  if sum(map(is_symbolic, shape)) > 1:
    raise UserError('cannot export a reshape with two unknown sizes to ONNX')
  return np.asarray([-1 if is_symbolic(n) else n for n in shape], np.int64)


def _written(node: _Node):
  """The operators of a node, what is pending put in: name, inputs, ..."""
  if node.scale is None:
    yield node.operator, node.inputs, node.output, node.attributes
    return
  scale, bias = node.scale, node.bias
  if node.operator == 'Affine':
    (x,) = node.inputs
    last = node.output
    if bias.any() and (scale != 1).any():
      yield 'Mul', [x, scale.astype(np.float32)], f'{last}_scaled', {}
      yield 'Add', [f'{last}_scaled', bias.astype(np.float32)], last, {}
    elif bias.any():
      yield 'Add', [x, bias.astype(np.float32)], last, {}
    elif (scale != 1).any():
      yield 'Mul', [x, scale.astype(np.float32)], last, {}
    else:
      yield 'Identity', [x], last, {}
    return
  inputs = list(node.inputs)
  i = next(i for i, x in enumerate(inputs) if not isinstance(x, str))
  weight = inputs[i].astype(np.float64)
  shape = [1] * weight.ndim
  shape[node.weight_axis] = -1
  inputs[i] = (weight * scale.reshape(shape if scale.size > 1 else [])).astype(
    np.float32
  )
  if node.operator == 'Conv':
    flat = np.broadcast_to(bias.ravel(), weight.shape[0])
    yield (
      'Conv',
      [*inputs, flat.astype(np.float32)],
      node.output,
      node.attributes,
    )
  elif bias.any():
    product = f'{node.output}_product'
    yield node.operator, inputs, product, node.attributes
    yield 'Add', [product, bias.astype(np.float32)], node.output, {}
  else:
    yield node.operator, inputs, node.output, node.attributes


def _onnx_type(dtype: np.dtype) -> int:
  try:
    return _TYPES[np.dtype(dtype).name]
  except KeyError:
    raise UserError(f'cannot export arrays of {dtype} to ONNX') from None


def _info(name: str, value: Value):
  shape = ['batch' if is_symbolic(n) else n for n in value.shape]
  return helper.make_tensor_value_info(name, _onnx_type(value.dtype), shape)


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
  """How many operators of each type a model has."""
  return dict(collections.Counter(node.op_type for node in model.graph.node))
