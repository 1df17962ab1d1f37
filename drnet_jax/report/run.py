# SPDX-License-Identifier: Apache-2.0
"""What a report reads of a workdir: neither images nor weights."""

import collections
import csv
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from drnet_jax.errors import UserError
from drnet_jax.report import pictures, policies
from drnet_jax.report.policies import Record
from drnet_jax.run import workdir

# Data sets whose name says how they are stored, not what they hold.
_STORAGE = ('folder', 'packed')


@dataclasses.dataclass(frozen=True)
class Run:
  """An evaluated run.

  Attributes:
    path: of the workdir.
    config: that it was begun with.
    class_names: in label order.
    record: of the test split.
    metrics: values by step of each metric of each stage.
    sessions: what was made when and with what, see `workdir.note`.
    evaluation: `report/evaluation.json`; {} of older runs.
    pictures: some test images as `data:` addresses, by index of the record.
  """

  path: str
  config: ml_collections.ConfigDict
  class_names: Sequence[str]
  record: Record
  metrics: Mapping[str, Mapping[str, Mapping[int, float]]]
  sessions: Sequence[Mapping[str, str]]
  evaluation: Mapping[str, Any]
  pictures: Mapping[int, str]

  @property
  def name(self) -> str:
    """The folder's name."""
    return os.path.basename(os.path.normpath(os.path.abspath(self.path)))

  @property
  def directory(self) -> str:
    """Where its report lies."""
    return os.path.join(self.path, 'report')

  @property
  def data(self) -> str:
    """The data set, for people: 'imagenette2_224, 100 images of a class'."""
    return data_name(self.config.data)

  @property
  def network(self) -> str:
    """The network, for people: 'resnet50'."""
    return network_name(self.config.model)

  @property
  def sizes(self) -> str:
    """What is chosen among: '112/168/224 px', or '6 exits'."""
    options = self.record.options
    if self.record.noun == 'exit':
      return f'{len(options)} exits'
    return '/'.join(o.removesuffix(' px') for o in options) + ' px'

  @property
  def routing(self) -> Mapping[str, Mapping[int, float]]:
    """Metrics of the stage that trains the router; {} if there is none."""
    for metrics in self.metrics.values():
      if 'train/entropy' in metrics:
        return metrics
    return {}


def is_evaluated(path: str) -> bool:
  """Whether there is something to report of a workdir."""
  return os.path.exists(_record_file(path))


def read(path: str) -> Run:
  """Reads an evaluated workdir.

  Raises:
    UserError: it is no workdir, or was not evaluated.
  """
  config = workdir.read_config(path)
  if not is_evaluated(path):
    raise UserError(
      f'{path} is not evaluated yet: python -m drnet_jax.main --mode=evaluate '
      f'--workdir={path}'
    )
  directory = os.path.join(path, 'report')
  return Run(
    path=path,
    config=config,
    class_names=_read_json(os.path.join(path, 'classes.json'), ()),
    record=policies.load(_record_file(path)),
    metrics=_read_metrics(os.path.join(path, 'metrics.csv')),
    sessions=workdir.sessions(path),
    evaluation=_read_json(os.path.join(directory, 'evaluation.json'), {}),
    pictures=pictures.load(directory),
  )


def data_name(data: Mapping[str, Any]) -> str:
  """The data set that a section `config.data` names."""
  name = data['name']
  if name in _STORAGE:
    folder = os.path.basename(os.path.normpath(data['data_dir']))
    name = folder.removesuffix('.npz')
  # Fields that older configs lack are off.
  parts = [name, data.get('classes') and f'classes {data["classes"]}']
  if data.get('images_per_class'):
    parts.append(f'{data["images_per_class"]} training images of a class')
  return ', '.join(part for part in parts if part)


def network_name(model: Mapping[str, Any]) -> str:
  """The network that a section `config.model` describes."""
  if 'base' not in model:
    return f'RANet {model["network"].get("configuration", "")}'.strip()
  base = model['base']
  name = base['network']
  if base.get('stage_sizes'):
    blocks = '-'.join(map(str, base['stage_sizes']))
    name += f' ({blocks} blocks, width {base["width"]})'
  elif base.get('width', 1.0) != 1.0:
    name += f' x{base["width"]}'
  return name


def _record_file(path: str) -> str:
  return os.path.join(path, 'report', 'record.npz')


def _read_json(path: str, default: Any) -> Any:
  if not os.path.exists(path):
    return default
  with open(path) as file:
    return json.load(file)


def _read_metrics(path: str) -> dict[str, dict[str, dict[int, float]]]:
  found = collections.defaultdict(lambda: collections.defaultdict(dict))
  if os.path.exists(path):
    with open(path, newline='') as file:
      for row in csv.DictReader(file):
        value = float(row['value'])
        if np.isfinite(value):
          found[row['stage']][row['metric']][int(row['step'])] = value
  return found
