# SPDX-License-Identifier: Apache-2.0
"""What `calibrate` leaves: the best policies for every budget, and their costs.

calibration.json  frontiers of every family, in GMACs and, where this machine
                  was measured, in milliseconds
calibration.npz   the record of the held-out images that they were found on
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drnet_jax import settings
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing import search
from drnet_jax.choosing.options import Costs, Options
from drnet_jax.choosing.policy import FAMILIES, Policy, fixed
from drnet_jax.choosing.record import Record
from drnet_jax.choosing.search import Point
from drnet_jax.errors import UserError

FILE = 'calibration.json'
RECORD = 'calibration.npz'
CHOICES = ('best', *FAMILIES)
_FORMAT = 4
# What a saving may cost in accuracy unless a budget says: top-1.
TOLERANCE = 0.003
_MOST_IMAGES = 10_000  # more hardly move a threshold
_FEWEST_IMAGES = 100  # of fewer one is worth a point: a lucky one would pass


@dataclasses.dataclass(frozen=True)
class Calibration:
  """See the module.

  Attributes:
    options: what is chosen among.
    costs: in each unit that was measured, 'GMACs' at least.
    points: by unit and family ('best' is of all), ascending in cost and top-1.
    kept: by family, what is followed without a budget: the cheapest policy, in
      milliseconds where they were measured, that surely keeps the accuracy of
      every option but for TOLERANCE; see `search.as_accurate`. Where none does,
      or images are few, the most expensive option ('best'), or the family's
      most accurate policy. Of the router: as trained.
    split: the images, for people: 'scaled_digits/validation'.
    images: how many.
    origin: of the weights and images, as in the record.
  """

  options: Options
  costs: Mapping[str, Costs]
  points: Mapping[str, Mapping[str, Sequence[Point]]]
  kept: Mapping[str, Point]
  split: str
  images: int
  origin: str

  @classmethod
  def of(
    cls, record: Record, *, split: str, ms: Costs | None = None
  ) -> 'Calibration':
    """Searches all families on the record of a held-out split.

    As much of it is used as is useful. `split` is for people, `ms` are the
    milliseconds of this machine, if they were measured.
    """
    count = len(record.label)
    used = min(count, _MOST_IMAGES)
    # Evenly spread: in a folder they stand class by class.
    record = record.some(np.arange(used) * count // used)
    costs = {c.unit: c for c in (record.costs, ms) if c}
    every = {k: search.tried(record, c) for k, c in costs.items()}
    points = {k: search.frontiers(every[k], c) for k, c in costs.items()}
    unit = 'ms' if ms else 'GMACs'
    return cls(
      options=record.options,
      costs=costs,
      points=points,
      kept=_kept(record, costs[unit], every[unit], points[unit]),
      split=split,
      images=used,
      origin=record.origin,
    )

  def find(
    self,
    *,
    policy: str = 'best',
    gmacs: float | None = None,
    ms: float | None = None,
    accuracy: float | None = None,
  ) -> Point:
    """The best policy of a family within a budget.

    Args:
      policy: one of CHOICES.
      gmacs: most that an image may cost on average, in 1e9 multiply-adds,
        everything counted.
      ms: the same in milliseconds.
      accuracy: top-1 in [0, 1] to reach at the least cost. Without any of the
        three: what is `kept`.

    Raises:
      UserError: not calibrated for it, or out of reach.
    """
    given = [x for x in (gmacs, ms, accuracy) if x is not None]
    if len(given) > 1:
      raise UserError('set one budget: gmacs, ms or accuracy')
    unit = 'GMACs' if ms is None else 'ms'
    points = self.family(unit, policy)
    if not given:
      return self.kept[policy]
    (asked,) = given
    if accuracy is None:
      point = search.within(points, asked)
      if point is None:
        raise UserError(
          f'a budget of {asked:g} {unit} is out of reach: the least is '
          f'{points[0].cost:.4g}, everything counted (by '
          f'{self.costs[unit].source})'
        )
      return point
    if accuracy > 1:
      raise UserError(
        f'accuracy = {accuracy:g} is no share: top-1 lies between 0 and 1'
      )
    enough = [p for p in points if p.top1 >= accuracy]
    if not enough:
      raise UserError(
        f'an accuracy of {accuracy:.4g} is out of reach: on the calibration '
        f'images the best is {points[-1].top1:.4g}'
      )
    return enough[0]

  def family(self, unit: str, policy: str) -> Sequence[Point]:
    """The frontier of a family.

    Raises:
      UserError: there is none.
    """
    if unit not in self.points:
      raise UserError(
        'no milliseconds were measured: python -m drnet_jax calibrate '
        '--workdir=... --measure=auto'
      )
    if policy not in CHOICES:
      raise UserError(f'policy = {policy!r} is not one of {CHOICES}')
    if policy not in self.points[unit]:
      without = 'a trained predictor' if 'rout' in policy else 'several options'
      raise UserError(f'policy = {policy!r} needs {without}')
    return self.points[unit][policy]

  def write(self, folder: str) -> None:
    """Writes `calibration.json`."""
    fields = dataclasses.asdict(self) | {'format': _FORMAT}
    settings.write_json(os.path.join(folder, FILE), fields)


def _kept(
  record: Record,
  costs: Costs,
  every: Mapping[str, Sequence[Point]],
  points: Mapping[str, Sequence[Point]],
) -> dict[str, Point]:
  """See `Calibration.kept`."""
  full = search.at(fixed(int(record.gmacs.argmax())), record, costs)
  found = {k: v[-1] for k, v in points.items()} | {'best': full}
  if len(record.label) >= _FEWEST_IMAGES:
    together = itertools.chain(*every.values())
    for family, some in {**every, 'best': together}.items():
      sure = search.as_accurate(some, record, TOLERANCE)
      found[family] = sure or found[family]
  if 'router' in every:
    found['router'] = every['router'][0]  # as trained
  return found


def read(folder: str) -> Calibration | None:
  """What `Calibration.write` left in a workdir, an export or a ladder, if any.

  Raises:
    UserError: the file is damaged, or of another version.
  """
  path = os.path.join(folder, FILE)
  if not os.path.exists(path):
    return None
  try:
    with open(path) as file:
      fields = json.load(file, object_hook=_with_tuples)
    if 'format' not in fields:
      return None  # of version 0.4, which knew other policies
    if fields['format'] != _FORMAT:
      raise ValueError('it is of another version')
    return _from_json(fields)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{path} cannot be used ({error}): calibrate, or export, again, or '
      'delete it'
    ) from error


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _from_json(fields: dict[str, Any]) -> Calibration:
  def point(p: dict[str, Any]) -> Point:
    return Point(**p | {'policy': Policy.from_json(p['policy'])})

  return Calibration(
    options=Options(**fields['options']),
    costs={unit: Costs(**costs) for unit, costs in fields['costs'].items()},
    points={
      unit: {
        family: list(map(point, points)) for family, points in families.items()
      }
      for unit, families in fields['points'].items()
    },
    kept={family: point(p) for family, p in fields['kept'].items()},
    **{name: fields[name] for name in ('split', 'images', 'origin')},
  )


def write_record(folder: str, record: Record) -> None:
  """Keeps the record of the held-out images, for another search."""
  record_lib.save(record, os.path.join(folder, RECORD))


def read_record(folder: str) -> Record | None:
  """What `write_record` kept, if anything."""
  path = os.path.join(folder, RECORD)
  return record_lib.load(path) if os.path.exists(path) else None
