# SPDX-License-Identifier: Apache-2.0
"""Exported graphs, rewritten as OpenVINO runs them best.

A size smaller than the crop begins with its resize, R x C of two constants: R
shrinks the rows of `x`, C its columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Of one channel of what a core should work on at once: of twice and of half as
# much each image takes 3 to 10 % longer.
_BYTES = 2**18


def at_once(model: Any, precision: str) -> int | None:
  """How many images a core should compute at once; None if it does not matter.

  A depthwise convolution waits for memory, so that maps should still be in the
  cache. In float32 a program for two images of 160 px, four of 112 or eight of
  64 takes 7 to 19 % less time than eight in one for any number (MobileNetV2; a
  ResNet-50 takes the same).
  """
  kinds = {node.get_type_name(): node for node in model.get_ordered_ops()[::-1]}
  if 'GroupConvolution' not in kinds:
    return None
  side = kinds['Convolution'].input(0).get_partial_shape()[2].get_length()
  bytes_each = side * side * (4 if precision == 'f32' else 2)
  return int(np.clip(2 ** np.round(np.log2(_BYTES / bytes_each)), 2, 8))


def resize_in_half(model: Any) -> None:
  """Rewrites R x C as (x C)ᵀ Rᵀ, turned back.

  OpenVINO computes a product in half precision only if the constant is its
  second factor, and what follows does not scale channels. A resize takes a
  third of the time of a small network at 64 px; so it takes a third less.
  """
  from openvino import opset13 as op

  def turned(node: Any) -> Any:
    return op.transpose(node, np.array([0, 1, 3, 2]))

  found = _resize(model)
  if found:
    rows, columns = found
    x, r, c = rows.input_value(1), rows.input_value(0), columns.input_value(1)
    narrow = turned(op.matmul(x, c, False, False))
    resized = turned(op.matmul(narrow, r, False, True))
    _replace(columns, resized)


def resize_in_blocks(model: Any) -> None:
  """Rewrites R x C as products of blocks, for most of R and C are zeros.

  A pixel is the mean of a few. Smaller blocks than these leave out more zeros,
  but take longer. In float32 a resize takes a fifth of the time of a small
  network at 64 px, and so a fifteenth less of it.
  """
  from openvino import opset13 as op

  found = _resize(model)
  if not found:
    return
  rows, columns = found
  x = rows.input_value(1)
  r, c = (
    node.data.reshape(node.data.shape[-2:])
    for node in (_operand(rows, 0), _operand(columns, 1))
  )
  # Of rows, one product for all blocks: they reach equally far.
  spans = _spans(r, 16)
  reach = max(stop - start for start, stop in spans)
  first = [min(start, r.shape[1] - reach) for start, _ in spans]
  read = np.add.outer(first, np.arange(reach))
  blocks = [
    block[:, i] for block, i in zip(np.split(r, len(spans)), read, strict=True)
  ]
  shrunk = op.matmul(
    np.stack(blocks), op.gather(x, read, np.array(2)), False, False
  )
  shape = [-1, x.partial_shape[1].get_length(), *r.shape]
  shrunk = op.reshape(shrunk, np.array(shape), False)
  # Of columns, a product for each: to gather these takes longer.
  spans = _spans(c.T, 28)
  parts = []
  for block, span in zip(np.split(c, len(spans), 1), spans, strict=True):
    bounds = (np.array([i]) for i in (*span, 1, 3))
    part = op.slice(shrunk, *bounds)
    parts.append(op.matmul(part, block[slice(*span)].copy(), False, False))
  _replace(columns, op.concat(parts, 3))


def _spans(matrix: np.ndarray, least: int) -> list[tuple[int, int]]:
  """Of blocks of rows, the columns from the first to past the last not zero.

  As many blocks of equally many rows as can be, of `least` or more.
  """
  most = max(len(matrix) // least, 1)
  count = next(n for n in range(most, 0, -1) if len(matrix) % n == 0)
  used = [np.flatnonzero(x.any(0)) for x in np.split(matrix, count)]
  return [(int(x[0]), int(x[-1]) + 1) for x in used]


def merged(models: Sequence[Any]) -> tuple[Any, list[list[np.ndarray]]] | None:
  """One graph for all sizes of a network, exported with `--weights=shared`.

  What differs between them, norms and resizes, becomes further inputs. So the
  weights are in memory once, in the order that the processor likes. A
  ResNet-50 takes up to 7 % longer. Of depthwise convolutions the maps are
  large, the filters small, and OpenVINO turns the axes of each map that such an
  input scales: a MobileNetV2 would take 2 to 5 times as long.

  Args:
    models: graphs of the sizes. The one that is returned is made of one of
      them, which cannot be used any more.

  Returns:
    The graph; and for each size what to give it behind the images. None if the
    graphs differ in anything else, such as the filters of a convolution or how
    it pads, or have depthwise convolutions.
  """
  resizes = [_resize(model) for model in models]
  template = next((i for i, found in enumerate(resizes) if found), None)
  if template is None:
    return None
  nodes = [_others(*pair) for pair in zip(models, resizes, strict=True)]
  kinds = [[*map(_kind, of_size)] for of_size in nodes]
  if any(of_size != kinds[0] for of_size in kinds):
    return None
  if any(node.get_type_name() == 'GroupConvolution' for node in nodes[0]):
    return None
  parts = []  # a constant of the template, and its values at every size
  for same in zip(*nodes, strict=True):
    if same[0].get_type_name() == 'Constant':
      values = [node.data for node in same]
      if all(np.array_equal(values[0], x) for x in values[1:]):
        continue
      if any(x.get_type_name() == 'Convolution' for x in _readers(same[0])):
        return None  # of several networks
      parts.append((same[template], values))
  side_px = models[template].inputs[0].partial_shape[1].get_length()
  whole = np.eye(side_px, dtype=np.float32)  # of the size that is not resized
  for i, place in enumerate((0, 1)):
    of_sizes = [f and _operand(f[i], place) for f in resizes]
    values = [whole if x is None else x.data for x in of_sizes]
    parts.append((of_sizes[template], values))
  return _opened(models[template], parts), [
    [values[i].copy() for _, values in parts] for i in range(len(models))
  ]


def _opened(model: Any, parts: Sequence[tuple[Any, Sequence[np.ndarray]]]):
  """The model, with inputs in place of constants."""
  from openvino import opset13 as op

  inputs = []
  for constant, values in parts:
    shapes = np.array([x.shape for x in values])
    same = (shapes == shapes[0]).all(0)
    shape = np.where(same, shapes[0], -1).tolist()
    inputs.append(op.parameter(shape, values[0].dtype))
    _replace(constant, inputs[-1])
  model.add_parameters(inputs)
  model.validate_nodes_and_infer_types()
  return model


def _resize(model: Any) -> tuple[Any, Any] | None:
  """The two products of a resize, if there is one."""
  for node in model.get_ordered_ops():
    readers = _readers(node)
    if (
      len(readers) == 1
      and _operand(node, 0)
      and _operand(readers[0], 1)
      and node.output(0).partial_shape.rank.get_length() == 4
    ):
      return node, readers[0]
  return None


def _operand(node: Any, place: int) -> Any | None:
  """The constant that a matrix product has there."""
  if node.get_type_name() != 'MatMul':
    return None
  operand = node.input_value(place).get_node()
  return operand if operand.get_type_name() == 'Constant' else None


def _others(model: Any, resize: tuple[Any, Any] | None) -> list[Any]:
  """All operators but those of the resize."""
  names = set()
  for place, product in enumerate(resize or ()):
    operand = _operand(product, place)
    names |= {product.get_friendly_name(), operand.get_friendly_name()}
  return [
    node
    for node in model.get_ordered_ops()
    if node.get_friendly_name() not in names
  ]


def _kind(node: Any) -> tuple[Any, ...]:
  """What it is, how it works, and how many axes each of its outputs has."""
  name = node.get_type_name()
  how = {} if name == 'Constant' else node.get_attributes()
  return name, how, [str(x.partial_shape.rank) for x in node.outputs()]


def _readers(node: Any) -> list[Any]:
  return [x.get_node() for x in node.output(0).get_target_inputs()]


def _replace(old: Any, new: Any) -> None:
  for reader in old.output(0).get_target_inputs():
    reader.replace_source_output(new.output(0))
