# SPDX-License-Identifier: Apache-2.0
"""JAX's primitives that move, cut and reduce arrays, as ONNX operators."""

from collections.abc import Sequence

import numpy as np

from drnet_jax.errors import UserError
from drnet_jax.export.onnx_builder import Builder, Node, Tensor, onnx_type
from drnet_jax.export.traced import Value, is_symbolic

REDUCTIONS = {
  'reduce_sum': 'ReduceSum',
  'reduce_max': 'ReduceMax',
  'reduce_min': 'ReduceMin',
  'reduce_prod': 'ReduceProd',
}


class Shapes(Builder):
  """Writes operations on shapes.

  `_add_<primitive>` is found by its name, and called with the parameters, the
  array to make (several, of a split) and the arrays to read.
  """

  def _add_transpose(self, params, y: Value, x: Value) -> None:
    tensor = self._tensors[x]
    new_of_old = np.argsort(params['permutation'])
    axes = tuple(int(new_of_old[axis]) for axis in tensor.axes)
    self._tensors[y] = Tensor(tensor.name, axes, None)

  def _add_reshape(self, params, y: Value, x: Value, *_) -> None:
    self._emit('Reshape', [self._natural(x), _target(y.shape)], y)

  def _add_squeeze(self, params, y: Value, x: Value) -> None:
    tensor, gone = self._tensors[x], params['dimensions']
    places = np.asarray([tensor.place(axis) for axis in gone])
    axes = _without(tensor.axes, gone)
    self._emit('Squeeze', [tensor.name, places], y, axes)

  def _add_broadcast_in_dim(self, params, y: Value, x: Value, *_) -> None:
    old = dict(zip(params['broadcast_dimensions'], x.shape, strict=True))
    name = self._natural(x)
    new_axes = np.asarray([i for i in range(len(y.shape)) if i not in old])
    if len(new_axes):
      name = self._emit('Unsqueeze', [name, new_axes], y).name
    grown = [old.get(i, 1) != size for i, size in enumerate(y.shape)]
    if any(g and is_symbolic(n) for g, n in zip(grown, y.shape, strict=True)):
      raise UserError('cannot export an array repeated along the batch to ONNX')
    if any(grown):
      # A target of 1 leaves an axis as it is.
      target = np.asarray(
        [n if g else 1 for g, n in zip(grown, y.shape, strict=True)]
      )
      self._emit('Expand', [name, target], y)
    elif not len(new_axes):
      self._alias(self._tensors[x], y)

  def _add_concatenate(self, params, y: Value, *inputs: Value) -> None:
    for x in inputs:
      if x.constant is not None and any(map(is_symbolic, x.shape)):
        raise UserError(
          'cannot export a constant joined to the images (concatenate) to ONNX'
        )
    names, axes = self._operands(inputs)
    place = axes.index(params['dimension'])
    self._emit('Concat', names, y, axes, axis=place)

  def _add_stack(self, params, y: Value, *inputs: Value) -> None:
    new_axis = np.asarray([params['axis']])
    parts = [
      self._emit('Unsqueeze', [self._natural(x), new_axis], y).name
      for x in inputs
    ]
    self._emit('Concat', parts, y, axis=params['axis'])

  def _add_split(self, params, parts: list[Value], x: Value) -> None:
    axis, start = params['axis'], 0
    for size, y in zip(params['sizes'], parts, strict=True):
      self._cut(self._tensors[x], y, [axis], [start], [start + size], [1])
      start += size

  def _add_slice(self, params, y: Value, x: Value) -> None:
    axes = [i for i, n in enumerate(x.shape) if not is_symbolic(n)]
    strides = params['strides'] or [1] * len(x.shape)
    starts, ends, steps = (
      [bounds[axis] for axis in axes]
      for bounds in (params['start_indices'], params['limit_indices'], strides)
    )
    self._cut(self._tensors[x], y, axes, starts, ends, steps)

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
    name, left = tensor.name, list(tensor.axes)
    for axis, (grid_axis, pick) in zip(axes, picks, strict=True):
      node = Node(
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
    self._tensors[y] = Tensor(name, tuple(goes[a] for a in left), None)

  def _cut(self, tensor, y, axes, starts, ends, steps) -> None:
    places = [tensor.place(axis) for axis in axes]
    self._emit(
      'Slice',
      [tensor.name, *(np.asarray(v) for v in (starts, ends, places, steps))],
      y,
      tensor.axes,
    )

  def _add_pad(self, params, y: Value, x: Value, fill: Value) -> None:
    config = params['padding_config']
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

  def _reduce(self, operator: str, params, y: Value, x: Value) -> None:
    tensor, gone = self._tensors[x], params['axes']
    if any(is_symbolic(x.shape[axis]) for axis in gone):
      raise UserError('cannot export a reduction over the batch to ONNX')
    places = np.asarray(sorted(tensor.place(axis) for axis in gone))
    axes = _without(tensor.axes, gone)
    self._emit(operator, [tensor.name, places], y, axes, keepdims=0)

  def _add_argmax(self, params, y: Value, x: Value) -> None:
    tensor, gone = self._tensors[x], params['axes']
    axes = _without(tensor.axes, gone)
    place = tensor.place(gone[0])
    found = self._emit('ArgMax', [tensor.name], y, axes, axis=place, keepdims=0)
    self._emit('Cast', [found.name], y, axes, to=onnx_type(y.dtype))


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


def _target(shape) -> np.ndarray:
  """A shape for Reshape: -1 stands for the one size that is not known."""
  if sum(map(is_symbolic, shape)) > 1:
    raise UserError('cannot export a reshape with two unknown sizes to ONNX')
  return np.asarray([-1 if is_symbolic(n) else n for n in shape], np.int64)
