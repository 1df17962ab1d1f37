# SPDX-License-Identifier: Apache-2.0
"""Puts an exported folder into int8, as far as that costs little accuracy.

Post-training quantisation by NNCF: the ranges of activations come from some
images, biases are corrected for them. What every option, and the predictor,
loses is measured on other images, in the runtime that runs int8; a part that
loses too much stays in floating point.
"""

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from drnet_jax import settings
from drnet_jax.choosing.policy import Policy
from drnet_jax.errors import UserError
from drnet_jax.export import contract as contract_lib
from drnet_jax.export import model_card
from drnet_jax.export.contract import PREDICTOR, Contract, View
from drnet_jax.serve import choice, openvino
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.engines import INT8
from drnet_jax.serve.openvino import OpenVinoEngine
from drnet_jax.serve.picture import Picture

_MOST_FOR_RANGES = 300
_LEAST = 100  # images to measure on; one of them is a point
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Part:
  """What int8 changes at an option; of the predictor, in the routed answers.

  Attributes:
    name: '112 px', 'predictor', or 'as it will run': by the folder's policy.
    images: that were compared.
    float32: top-1 in [0, 1], in float32.
    int8: the same in int8.
    changed: images with another answer.
    is_int8: whether the folder has it in int8 now.
  """

  name: str
  images: int
  float32: float
  int8: float
  changed: int
  is_int8: bool

  @property
  def drop(self) -> float:
    """Points of top-1 that are lost."""
    return 100 * (self.float32 - self.int8)

  def row(self) -> dict[str, str]:
    """For a table."""
    return {
      'part': self.name,
      'float32, %': f'{100 * self.float32:.1f}',
      'int8, %': f'{100 * self.int8:.1f}',
      'lost, points': f'{self.drop:+.1f}',
      'answers changed': f'{self.changed} of {self.images:,}',
      'runs in': 'int8' if self.is_int8 else 'floating point',
    }


def check_installed() -> None:
  """Raises UserError if a package is missing that `quantize` needs."""
  for module, name in (('nncf', 'NNCF'), ('openvino', 'OpenVINO')):
    if not choice.is_installed(module):
      raise UserError(f"--int8 needs {name}: pip install 'drnet_jax[int8]'")


def quantize(
  folder: str, images: Sequence[Any], labels: Sequence[int], max_drop: float
) -> list[Part]:
  """Rewrites the graphs of an exported folder whose loss is small.

  Args:
    folder: that `export` wrote, with ONNX graphs.
    images: held out from training, see `Picture`; up to 300, but no more than
      half, set the ranges, the others measure.
    labels: theirs, int.
    max_drop: points of top-1 that a part may lose.

  Returns:
    Every part, and last what the folder does by its own policy.

  Raises:
    UserError: a package is missing, there are too few images, or every option
      or the policy, loses more.
  """
  check_installed()
  contract, usual, _ = contract_lib.read(folder)
  views = contract.views_of_programs
  pictures, labels = _readable(images, labels, contract, {*views.values()})
  ranges = min(_MOST_FOR_RANGES, len(pictures) // 2)
  if len(pictures) - ranges < _LEAST:
    raise UserError(
      f'int8 needs {2 * _LEAST} images that are held out from training, half '
      f'of them to measure what it loses; there are {len(pictures)}: '
      'config.data.validation_split'
    )
  for_ranges, others = pictures[:ranges], pictures[ranges:]
  labels = labels[ranges:]
  with tempfile.TemporaryDirectory(dir=folder) as made:
    for name, view in views.items():
      crops = [picture.crop(view) for picture in for_ranges]
      _write_int8(folder, made, f'{name}.onnx', crops)
    engines = [
      OpenVinoEngine(where, contract, precision=precision, batch=0)
      for where, precision in ((folder, 'f32'), (made, INT8))
    ]
    float32, int8 = (_labels(e, contract, others) for e in engines)
    names = contract.options.names
    parts = [
      _part(name, *answers, labels, max_drop)
      for name, *answers in zip(names, float32, int8, strict=True)
    ]
    if not any(part.is_int8 for part in parts):
      least = min(part.drop for part in parts)
      raise UserError(
        f'int8 loses {least:.1f} points of top-1 or more at every option: '
        f'{folder} stays in float32; --max_drop allows more'
      )
    if contract.routes:
      # Of the router as trained; the sizes answer in float32 in both cases.
      chosen = (_choices(e, contract, others) for e in engines)
      routed = (float32[choice, np.arange(len(others))] for choice in chosen)
      parts.append(_part(PREDICTOR, *routed, labels, max_drop))
    before = _answers(engines[0], contract, usual, others)
    kept = [f'{n}.onnx' for n, p in zip(views, parts, strict=True) if p.is_int8]
    left = [f'{name}.onnx' for name in views if f'{name}.onnx' not in kept]
    for file in (*left, *(['weights.bin'] if left else [])):
      shutil.copy(os.path.join(folder, file), os.path.join(made, file))
    engine = OpenVinoEngine(made, contract, precision=INT8, batch=0)
    after = _answers(engine, contract, usual, others)
    # Parts that lose little each may lose more together.
    whole = _part('as it will run', before, after, labels, max_drop)
    if not whole.is_int8:
      raise UserError(
        f'int8 loses {whole.drop:.1f} points of top-1 by the policy that is '
        f'followed: {folder} stays in float32; --max_drop allows more, or ask '
        'for another policy'
      )
    for file in kept:
      os.replace(os.path.join(made, file), os.path.join(folder, file))
  parts.append(whole)
  _note(folder, parts)
  return parts


def _readable(
  images: Sequence[Any],
  labels: Sequence[int],
  contract: Contract,
  views: set[View],
) -> tuple[list[Picture], np.ndarray]:
  """Those that can be read, in another order: folders stand class by class."""
  pictures, found = [], []
  for i in np.random.default_rng(0).permutation(len(images)):
    picture = Picture(images[i], contract)
    try:
      picture.cut(views)
    except UserError:
      continue  # as in evaluation
    pictures.append(picture)
    found.append(labels[i])
  return pictures, np.asarray(found)


def _write_int8(
  folder: str, to: str, file: str, crops: Sequence[np.ndarray]
) -> None:
  """Writes an int8 graph, its weights inside, of one in floating point."""
  import onnx

  with openvino.without_telemetry():
    import nncf
  nncf.set_log_level(logging.ERROR)
  model = onnx.load(os.path.join(folder, file))
  kinds = [node.op_type for node in model.graph.node]
  # What resizes and normalises, whose input are bytes: it costs next to nothing
  # and the network is to see the same pixels.
  before = kinds.index('Conv') if 'Conv' in kinds else 0
  ignored = nncf.IgnoredScope(
    names=[node.name for node in model.graph.node[:before]], validate=False
  )
  source = model.graph.input[0].name
  model = nncf.quantize(
    model,
    nncf.Dataset([{source: crop[None]} for crop in crops]),
    preset=nncf.QuantizationPreset.MIXED,
    subset_size=len(crops),
    ignored_scope=ignored,
  )
  onnx.save_model(model, os.path.join(to, file))


def _labels(
  engine: OpenVinoEngine, contract: Contract, pictures: Sequence[Picture]
) -> np.ndarray:
  """What each option answers, int [R, N]."""
  found = []
  for j, view in enumerate(contract.views):
    crops = [picture.crop(view) for picture in pictures]
    said = _batched(lambda images, j=j: engine.run(j, images)[0], crops)
    found.append(said.argmax(-1))
  return np.stack(found)


def _choices(
  engine: OpenVinoEngine, contract: Contract, pictures: Sequence[Picture]
) -> np.ndarray:
  """The options that the predictor finds likeliest, int [N]."""
  crops = [picture.crop(contract.predictor_view) for picture in pictures]
  return np.take(contract.routes, _batched(engine.log_p, crops).argmax(-1))


def _batched(call: Callable, crops: Sequence[np.ndarray]) -> np.ndarray:
  parts = [
    np.stack(crops[i : i + _BATCH]) for i in range(0, len(crops), _BATCH)
  ]
  return np.concatenate([np.asarray(call(part)) for part in parts])


def _answers(
  engine: OpenVinoEngine,
  contract: Contract,
  policy: Policy,
  pictures: Sequence[Picture],
) -> np.ndarray:
  """What a policy answers, int [N]."""
  classifier = Classifier(contract, engine)
  classifier.policy = policy
  return np.array([found.label for found in classifier.predict(pictures)])


def _part(
  name: str,
  float32: np.ndarray,
  int8: np.ndarray,
  labels: np.ndarray,
  max_drop: float,
) -> Part:
  """Of what two ways answer, int [N] each."""
  part = Part(
    name=name,
    images=len(labels),
    float32=float(np.mean(float32 == labels)),
    int8=float(np.mean(int8 == labels)),
    changed=int(np.sum(float32 != int8)),
    is_int8=True,
  )
  return dataclasses.replace(part, is_int8=part.drop <= max_drop)


def _note(folder: str, parts: Sequence[Part]) -> None:
  """Writes down what was found, for those who load the folder and read it."""
  file = os.path.join(folder, contract_lib.FILE)
  fields = settings.read_json(file)
  found = [dataclasses.asdict(part) for part in parts]
  settings.write_json(file, fields | {'int8': found})
  if all(part.is_int8 for part in parts):
    os.remove(os.path.join(folder, 'weights.bin'))
  with open(os.path.join(folder, 'README.md'), 'a') as card:
    card.write(model_card.int8_section([part.row() for part in parts]))
