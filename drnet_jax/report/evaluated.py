# SPDX-License-Identifier: Apache-2.0
"""What a report reads of a workdir: neither images nor weights."""

import collections
import csv
import dataclasses
import functools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from drnet_jax import settings
from drnet_jax.choosing import calibration as calibration_lib
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing import scores, search
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.record import Record
from drnet_jax.choosing.scores import Interval, Judgement, Score, Scored
from drnet_jax.errors import UserError
from drnet_jax.report import pictures
from drnet_jax.run import ladder, workdir

# Data sets whose name says how they are stored, not what they hold.
_STORAGE = ('folder', 'packed')
_BUDGETS = 24  # that are checked on the test images


class Checked(NamedTuple):
  """What a calibration gives for a budget.

  Attributes:
    budget: most that an image may cost on average, in 1e9 multiply-adds.
    point: the policy, with what it promises.
    got: its score on the test images.
  """

  budget: float
  point: search.Point
  got: Score


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
  """An evaluated run; what else there is of it is read when it is needed.

  Attributes:
    path: of the workdir, or the folder of a ladder.
    record: of the test split.
    calibration: of the same weights; None where there is none.
    asked: which policy to judge, as for `Calibration.find`.
  """

  path: str
  record: Record
  calibration: Calibration | None
  asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def first(self) -> str:
    """The workdir, or the first of those of a ladder."""
    return _first(self.path)

  @functools.cached_property
  def config(self) -> ml_collections.ConfigDict:
    """That it was begun with; of a ladder, the first run's."""
    return workdir.read_config(self.first)

  @functools.cached_property
  def class_names(self) -> Sequence[str]:
    """In label order."""
    return workdir.class_names(self.first)

  @functools.cached_property
  def sessions(self) -> Sequence[Mapping[str, str]]:
    """What was made when and with what, see `workdir.note`."""
    return workdir.sessions(self.path)

  @functools.cached_property
  def evaluation(self) -> Mapping[str, Any]:
    """`report/evaluation.json`; {} of older runs."""
    path = os.path.join(self.path, workdir.EVALUATION)
    return settings.read_json(path) if os.path.exists(path) else {}

  @functools.cached_property
  def pictures(self) -> Mapping[int, str]:
    """Some test images as `data:` addresses, by index of the record."""
    return pictures.load(self.directory)

  @functools.cached_property
  def metrics(self) -> Mapping[str, Mapping[str, Mapping[int, float]]]:
    """Values by step of each metric of each stage."""
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    path = os.path.join(self.path, 'metrics.csv')
    if os.path.exists(path):
      with open(path, newline='') as file:
        text = file.read()
      whole = text[: text.rfind('\n') + 1]  # a kill may leave a part of a row
      for row in csv.DictReader(whole.splitlines()):
        value = float(row['value'])
        if np.isfinite(value):
          found[row['stage']][row['metric']][int(row['step'])] = value
    return found

  @property
  def router(self) -> Policy | None:
    """The predictor as it was trained; None where there is none."""
    routes = policy_lib.routes(self.record)
    if len(routes) < 2:
      return None
    return policy_lib.router(self.record.costs, routes)

  @functools.cached_property
  def found(self) -> search.Point | None:
    """The calibrated policy; None without one, or for the router as trained."""
    as_trained = self.asked == {'policy': 'router'}
    if as_trained or not self.calibration or len(self.record.options) < 2:
      return None
    return self.calibration.find(**self.asked)

  @property
  def policy(self) -> Policy | None:
    """What this run is judged by: the best policy asked for, or the router."""
    return self.found.policy if self.found else self.router

  @functools.cached_property
  def judgement(self) -> Judgement | None:
    """The policy among its rivals; None where nothing chooses.

    Rivals of other families are those that the calibration finds best within
    the cost of the policy. Without a calibration their thresholds are taken
    from the test images, which favours them.
    """
    if self.policy is None:
      return None
    if self.found:
      asked = self.asked.get('policy', 'best').replace('_', ' ')
      name, cost = f'{asked} policy', self.found.gmacs
    else:
      name = 'router as trained' if self.calibration else 'router'
      cost = scores.score(self.policy, self.record, name).gmacs
    if self.calibration:
      families = self.calibration.points['GMACs']
    else:
      families = {'cascade': search.cascades(self.record, self.record.costs)}
    others = {}
    for family in ('router', 'cascade', 'routed_cascade'):
      rival = search.within(families.get(family, ()), cost)
      if rival and rival.policy != self.policy:
        others[family.replace('_', ' ')] = rival.policy
    if self.found and self.router:
      others['router as trained'] = self.router
    return scores.judge(self.record, self.policy, name=name, others=others)

  @functools.cached_property
  def router_judgement(self) -> Judgement | None:
    """The router as trained among its rivals; None without one."""
    if self.found is None or self.router is None:
      return self.judgement if self.router else None
    return scores.judge(self.record, self.router, name='router')

  @functools.cached_property
  def fixed(self) -> tuple[Scored, ...]:
    """Every option for all images; gains are none where nothing chooses."""
    if self.judgement:
      return self.judgement.fixed
    alone = scores.judge(self.record, policy_lib.fixed(0), name='')
    none = Interval(np.nan, np.nan, np.nan)
    return tuple(dataclasses.replace(one, gain=none) for one in alone.fixed)

  @functools.cached_property
  def budgets(self) -> dict[str, list[Checked]]:
    """Of each family what it promised for each budget, and what the test gave.

    The same budgets for all, from the cheapest option to the most expensive;
    those that a family has nothing for are left out.
    """
    if not self.calibration:
      return {}
    found = {}
    asked = np.geomspace(
      self.record.gmacs.min(), self.record.costs.full, _BUDGETS
    )
    score = functools.cache(lambda p: scores.score(p, self.record, ''))
    for family, points in self.calibration.points['GMACs'].items():
      best = [(b, search.within(points, b)) for b in asked]
      found[family] = [Checked(b, p, score(p.policy)) for b, p in best if p]
    return found

  def scores(self) -> list[Score]:
    """Fixed options, policies and rivals, on the test images."""
    if judged := self.judgement:
      return [
        Score(s.name, s.gmacs.value, s.top1.value, s.top5, s.shares)
        for s in judged.all
      ]
    return [*scores.fixed_scores(self.record), scores.oracle(self.record)]

  def ends(self) -> np.ndarray | None:
    """int [N], the option at which each image ends; None if nothing chooses."""
    if self.policy is None:
      return None
    return policy_lib.decide(self.policy, self.record, self.record.costs).option

  def rank_correlations(self) -> dict[str, float]:
    """Of where images end with the numeric fields of the data set."""
    ends = self.ends()
    return {} if ends is None else scores.rank_correlations(self.record, ends)

  @property
  def session(self) -> Mapping[str, str]:
    """That which evaluated it; {} if it is not noted."""
    made = (s for s in reversed(self.sessions) if s['what'] == 'evaluate')
    return next(made, {})

  @property
  def name(self) -> str:
    """The folder's name."""
    return os.path.basename(os.path.abspath(self.path))

  @property
  def directory(self) -> str:
    """Where its report lies."""
    return os.path.join(self.path, 'report')

  @property
  def data(self) -> str:
    """The data set, for people: 'in100, 100 training images of a class'."""
    data = self.config.data
    name = data.name
    if name in _STORAGE:
      folder = os.path.basename(os.path.normpath(data.data_dir))
      name = folder.removesuffix('.npz')
    # Fields that older configs lack are off.
    parts = [name, data.get('classes') and f'classes {data.classes}']
    if data.get('images_per_class'):
      parts.append(f'{data.images_per_class} training images of a class')
    return ', '.join(part for part in parts if part)

  @property
  def network(self) -> str:
    """The network, for people: 'resnet50'."""
    if ladder.is_ladder(self.path):
      return f'ladder of {" and ".join(ladder.members(self.path))}'
    model = self.config.model
    if 'base' not in model:
      return f'RANet {model.network.get("configuration", "")}'.strip()
    base = model.base
    if base.get('stage_sizes'):
      blocks = '-'.join(map(str, base.stage_sizes))
      width = f', width {base.width}' if 'width' in base else ''
      return f'{base.network} ({blocks} blocks{width})'
    if base.get('width', 1.0) != 1.0:
      return f'{base.network} x{base.width}'
    return base.network

  @property
  def setting(self) -> str:
    """Data set and network, for people."""
    return f'{self.data}, {self.network}'

  @property
  def sizes(self) -> str:
    """What is chosen among: '112/168/224 px', or '6 exits'."""
    names, noun = self.record.options.names, self.record.options.noun
    if noun != 'size':
      return f'{len(names)} {noun}s'
    return '/'.join(name.removesuffix(' px') for name in names) + ' px'

  @property
  def routing(self) -> Mapping[str, Mapping[int, float]]:
    """Metrics of the stage that trains the router; {} if there is none."""
    return next((m for m in self.metrics.values() if 'train/entropy' in m), {})


def is_evaluated(path: str) -> bool:
  """Whether there is something to report of a workdir."""
  return os.path.exists(os.path.join(path, workdir.TEST_RECORD))


def how_to_calibrate(path: str) -> str:
  """The command for a workdir, or for the folder of a ladder."""
  words = [f'--workdir={path}']
  if ladder.is_ladder(path):
    members = ','.join(ladder.members(path).values())
    words = [f'--workdir={members}', f'--to={path}']
  return f'python -m drnet_jax calibrate {shlex.join(words)}'


def read(path: str, **asked: Any) -> EvaluatedRun:
  """Reads an evaluated workdir, or the folder of a ladder.

  Args:
    path: of it.
    **asked: `policy`, `gmacs`, `ms` or `accuracy`, see `EvaluatedRun`.

  Raises:
    UserError: it is not a workdir, was not evaluated, or is not calibrated for
      what is asked.
  """
  workdir.read_config(_first(path))  # says what is wrong with a wrong folder
  if not is_evaluated(path):
    evaluate = f'python -m drnet_jax.main --mode=evaluate --workdir={path}'
    if ladder.is_ladder(path):
      evaluate = how_to_calibrate(path)
    raise UserError(f'{path} is not evaluated yet: {evaluate}')
  record = record_lib.load(os.path.join(path, workdir.TEST_RECORD))
  calibrated = calibration(path, record)
  if asked == {'policy': 'router'}:  # as trained: no calibration needed
    if len(policy_lib.routes(record)) < 2:
      raise UserError(f'{path}: --policy=router needs a trained predictor')
  elif asked and not calibrated:
    raise UserError(
      f'{path} is not calibrated for its weights: {how_to_calibrate(path)}'
    )
  return EvaluatedRun(path, record, calibrated, asked)


def _first(path: str) -> str:
  if ladder.is_ladder(path):
    return next(iter(ladder.members(path).values()))
  return path


def calibration(path: str, record: Record) -> Calibration | None:
  """That of a workdir, if it is of the weights that were evaluated."""
  try:
    found = calibration_lib.read(path)
  except UserError:  # of an older version; `calibrate` makes it anew
    return None
  return found if found and _weights(found) == _weights(record) else None


def _weights(of: Record | Calibration) -> list[str]:
  """Which weights it is of; of a ladder, those of all its networks."""
  return re.findall(r'weights \w+', of.origin) or [of.origin.partition(';')[0]]
