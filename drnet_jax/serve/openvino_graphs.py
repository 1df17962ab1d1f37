# SPDX-License-Identifier: Apache-2.0
"""Exported graphs, rewritten as OpenVINO runs them best.

A size smaller than the crop begins with its resize, R x C of two constants: R
shrinks the rows of `x`, C its columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


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
