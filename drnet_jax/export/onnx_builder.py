# SPDX-License-Identifier: Apache-2.0
"""The ONNX graph under construction: its tensors, its nodes, and their names.

See `onnx_graph` on the order of a tensor's axes, and on what is pending.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from drnet_jax.errors import UserError
from drnet_jax.export.traced import Program, Value, is_symbolic

INPUT = 'images'  # name of a model's input
_OPSET = 18
_IR_VERSION = 9  # later than the opset needs, early enough for old runtimes

_TYPES = ('float32', 'float64', 'int32', 'int64', 'int8', 'uint8', 'bool')


@dataclasses.dataclass(eq=False)
class Tensor:
  """An array in the ONNX graph.

  Attributes:
    name: there.
    axes: `axes[i]` is the axis of the traced array that is stored at place i.
    node: that makes it; None for the input, and for a second Value's array.
  """

  name: str
  axes: tuple[int, ...]
  node: 'Node | None' = None

  def place(self, axis: int) -> int:
    """Where a traced axis is stored."""
    return self.axes.index(axis)


@dataclasses.dataclass(eq=False)
class Node:
  """An ONNX operator to be written.

  Attributes:
    operator: its type; 'Affine' stands for x * scale + bias.
    inputs: tensors, or constants.
    output: name.
    attributes: of the operator.
    weight_axis: for a product with a weight as its last or only constant
      input, the axis of the weight that is the output's channel; else None.
    channel_place: where that channel is stored in the output.
    scale, bias: pending, per channel, broadcastable to the output.
  """

  operator: str
  inputs: list[Tensor | np.ndarray]
  output: str
  attributes: dict[str, Any]
  weight_axis: int | None = None
  channel_place: int = 0
  scale: np.ndarray | None = None
  bias: np.ndarray | None = None


class Builder:
  """The graph; what writes the operators is built upon it."""

  def __init__(self, program: Program, *, fold_norms: bool):
    self._fold_norms = fold_norms
    self._nodes: list[Node] = []
    self._program = program
    rank = len(program.input.shape)
    first = Tensor(INPUT, tuple(range(rank)))
    self._tensors: dict[Value, Tensor] = {program.input: first}
    if rank == 4 and any(
      o.name == 'conv_general_dilated' for o in program.operations
    ):
      # While the pixels are still bytes: a quarter of the memory to move.
      self._tensors[program.input] = self._arranged(first, (0, 3, 1, 2))

  def finish(self, output_name: str) -> onnx.ModelProto:
    """The model."""
    output = self._program.output
    if output.constant is not None:
      raise UserError('the output does not depend on the images')
    last = self._arranged(self._tensors[output], range(len(output.shape)))
    self._nodes.append(Node('Identity', [last], output_name, {}))
    nodes, initializers = [], []

    def named(x: Tensor | np.ndarray, name: str) -> str:
      if isinstance(x, Tensor):
        return x.name
      x = np.asarray(x, order='C')
      initializers.append(numpy_helper.from_array(x, name))
      return name

    for node in self._nodes:
      for operator, inputs, out, attributes in _written(node):
        names = [named(x, f'{out}_c{i}') for i, x in enumerate(inputs)]
        made = helper.make_node(operator, names, [out], name=out, **attributes)
        nodes.append(made)
    graph = helper.make_graph(
      nodes,
      'drnet_jax',
      [_info(INPUT, self._program.input)],
      [_info(output_name, output)],
      initializers,
    )
    model = helper.make_model(
      graph,
      producer_name='drnet_jax',
      opset_imports=[helper.make_opsetid('', _OPSET)],
      ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model

  def _add_node(
    self, operator: str, inputs, axes: Sequence[int], **attributes
  ) -> Tensor:
    """Adds a node; its output is stored in this order of axes."""
    name = f'{operator.lower()}_{len(self._nodes)}'
    node = Node(operator, list(inputs), name, attributes)
    self._nodes.append(node)
    return Tensor(name, tuple(axes), node)

  def _emit(
    self, operator: str, inputs, value: Value, axes=None, **attributes
  ) -> Tensor:
    """Adds a node that makes a traced array.

    Without `axes`, stored in the order of the first input that has as many;
    without such an input, as traced.
    """
    rank = len(value.shape)
    if axes is None:
      tensors = (x for x in inputs if isinstance(x, Tensor))
      alike = (x.axes for x in tensors if len(x.axes) == rank)
      axes = next(alike, range(rank))
    tensor = self._add_node(operator, inputs, axes, **attributes)
    self._tensors[value] = tensor
    return tensor

  def _alias(self, value: Value, tensor: Tensor, axes=None) -> None:
    """Gives an array that is already there to another value.

    Without its node: what is put into that would show in both.
    """
    self._tensors[value] = Tensor(tensor.name, tuple(axes or tensor.axes))

  def _arranged(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The same array stored in this order of axes."""
    if tensor.axes == tuple(axes):
      return tensor
    perm = [tensor.place(axis) for axis in axes]
    return self._add_node('Transpose', [tensor], axes, perm=perm)

  def _natural(self, value: Value) -> Tensor | np.ndarray:
    """An array whose axes are stored as traced."""
    if value.constant is not None:
      return value.constant
    return self._arranged(self._tensors[value], range(len(value.shape)))

  def _operands(self, inputs: Sequence[Value]):
    """Arrays to combine, all stored in one order; that order."""
    rank = max(len(x.shape) for x in inputs)
    axes = next(
      self._tensors[x].axes
      for x in inputs
      if x.constant is None and len(x.shape) == rank
    )
    found = []
    for x in inputs:
      if (c := x.constant) is not None:
        found.append(c if c.ndim == 0 else c.transpose(axes))
      elif len(x.shape) == rank:
        found.append(self._arranged(self._tensors[x], axes))
      else:
        found.append(self._tensors[x])  # a scalar
    return found, axes


def _written(node: Node):
  """Yields operators of a node, what is pending put in: type, inputs, ..."""
  operator, inputs, out = node.operator, list(node.inputs), node.output
  scale, bias, attributes = node.scale, node.bias, node.attributes
  if scale is None:
    yield operator, inputs, out, attributes
    return
  shift = bias.astype(np.float32)
  if operator == 'Affine':
    if (scale != 1).any():
      operator, inputs = 'Mul', [*inputs, scale.astype(np.float32)]
    elif bias.any():
      yield 'Add', [*inputs, shift], out, {}
      return
    else:
      operator = 'Identity'
  else:
    i = next(i for i, x in enumerate(inputs) if not isinstance(x, Tensor))
    weight = inputs[i].astype(np.float64)
    shape = [1] * weight.ndim
    shape[node.weight_axis] = -1
    scaled = weight * scale.reshape(shape if scale.size > 1 else [])
    inputs[i] = scaled.astype(np.float32)
    if operator == 'Conv':
      flat = np.broadcast_to(shift.ravel(), weight.shape[0])
      yield operator, [*inputs, flat], out, attributes
      return
  if not bias.any():
    yield operator, inputs, out, attributes
    return
  product = Tensor(f'{out}_product', ())
  yield operator, inputs, product.name, attributes
  yield 'Add', [product, shift], out, {}


def onnx_type(dtype: np.dtype) -> int:
  """ONNX's number of a type; UserError where arrays of it are not written."""
  if dtype.name not in _TYPES:
    raise UserError(f'cannot export arrays of {dtype} to ONNX')
  return helper.np_dtype_to_tensor_dtype(dtype)


def _info(name: str, value: Value):
  shape = ['batch' if is_symbolic(n) else n for n in value.shape]
  return helper.make_tensor_value_info(name, onnx_type(value.dtype), shape)
