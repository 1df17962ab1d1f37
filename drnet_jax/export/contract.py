# SPDX-License-Identifier: Apache-2.0
"""What everyone who runs a trained model must agree on, besides its weights."""

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from drnet_jax import settings
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.options import Costs, Options
from drnet_jax.choosing.policy import Policy
from drnet_jax.data import classes
from drnet_jax.errors import UserError
from drnet_jax.export import DECODINGS

if TYPE_CHECKING:  # a folder that was exported runs without these
  from drnet_jax.run import workdir

FILE = 'contract.json'
PREDICTOR = 'predictor'  # name of its program


@dataclasses.dataclass(frozen=True)
class View:
  """How an image becomes the input of a network.

  Attributes:
    side_px: of the central square that is cut.
    short_px: short side of the image before.
    keep_aspect: False where the image is squashed to a square of that side.
  """

  side_px: int
  short_px: int
  keep_aspect: bool


@dataclasses.dataclass(frozen=True)
class Contract:
  """How images become inputs, what the outputs mean, what each option costs.

  Attributes:
    options: what is chosen among, R of them.
    sizes_px: [R], the side that each option's network works at.
    antialias: [R], whether it shrinks with a low-pass.
    views: [R], what each is given; it resizes itself.
    programs: [R], their names, of files too.
    gmacs: [R], cost of each with nothing run before, in 1e9 multiply-adds.
    routes: options that the predictor chooses among; () without one.
    predictor_view: what it is given; None without one.
    predictor_gmacs: its cost.
    decode: 'full': a file is decoded whole and every network of a model is
      given one crop. 'scaled': every network is given a crop of its own size,
      and a JPEG is decoded at twice what the largest takes, where it can.
    class_names: in label order.
    origin: which weights, for people.
  """

  options: Options
  sizes_px: tuple[int, ...]
  antialias: tuple[bool, ...]
  views: tuple[View, ...]
  programs: tuple[str, ...]
  gmacs: tuple[float, ...]
  routes: tuple[int, ...]
  predictor_view: View | None
  predictor_gmacs: float
  decode: str
  class_names: tuple[str, ...]
  origin: str

  @property
  def views_of_programs(self) -> dict[str, View]:
    """What each program is given; the predictor's, if there is one, is last."""
    views = dict(zip(self.programs, self.views, strict=True))
    if self.routes:
      views[PREDICTOR] = self.predictor_view
    return views

  @classmethod
  def of(
    cls, trained: 'workdir.Trained', *, decode: str = 'full'
  ) -> 'Contract':
    """That of a trained model."""
    model, data = trained.model, trained.config.data
    if decode not in DECODINGS:
      raise UserError(f'decode = {decode!r} is not one of {DECODINGS}')
    resize_px = data.resize_px or model.image_px  # 0: no margin

    def view(size_px: int) -> View:
      side_px = model.image_px if decode == 'full' else size_px
      short_px = max(round(resize_px * side_px / model.image_px), side_px)
      return View(side_px, short_px, data.keep_aspect)

    has_router = trained.has_router
    options, macs = Options.of(model.options), model.macs()
    sizes_px = getattr(model, 'resolutions', (model.image_px,) * len(options))
    return cls(
      options=options,
      sizes_px=sizes_px,
      antialias=(getattr(model, 'antialias', True),) * len(options),
      views=tuple(view(size_px) for size_px in sizes_px),
      programs=tuple(
        name.replace(' ', '') if name.startswith('exit') else f'r{size_px}'
        for name, size_px in zip(options.names, sizes_px, strict=True)
      ),
      gmacs=macs.gmacs,
      routes=tuple(range(len(options))) if has_router else (),
      predictor_view=view(model.predictor_px) if has_router else None,
      predictor_gmacs=macs.predictor / 1e9 if has_router else 0.0,
      decode=decode,
      class_names=trained.class_names,
      origin=trained.origin,
    )

  @classmethod
  def join(cls, several: 'Mapping[str, Contract]') -> 'Contract':
    """That of a ladder: networks one after another, by their names.

    Its predictor is that of the first network that has one.

    Raises:
      UserError: they do not know the same classes.
    """
    (first_name, first), *others = several.items()
    for name, other in others:
      if other.class_names != first.class_names:
        raise UserError(
          f'{first_name} and {name} do not know the same classes: '
          f'{classes.difference(first.class_names, other.class_names)}'
        )
    before, router = 0, first
    for one in several.values():
      if one.routes:
        router = one
        break
      before += len(one.options)
    of_each = {
      field: sum((getattr(one, field) for one in several.values()), ())
      for field in ('sizes_px', 'antialias', 'views', 'gmacs')
    }
    return dataclasses.replace(
      first,
      **of_each,
      options=Options.join({k: c.options for k, c in several.items()}),
      programs=tuple(
        f'{k + 1}_{program}'
        for k, one in enumerate(several.values())
        for program in one.programs
      ),
      routes=tuple(before + j for j in router.routes),
      predictor_view=router.predictor_view,
      predictor_gmacs=router.predictor_gmacs,
      origin='; '.join(f'{k}: {c.origin}' for k, c in several.items()),
    )

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> 'Contract':
    """Inverse of `to_json`; other fields are passed over."""

    def tuples(found: Mapping[str, Any]) -> dict[str, Any]:
      return {
        k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
      }

    before = {'antialias': [True] * len(fields['sizes_px'])}  # of 0.4
    names = (field.name for field in dataclasses.fields(cls))
    values = tuples({name: (before | fields)[name] for name in names})
    values['options'] = Options(**tuples(fields['options']))
    values['views'] = tuple(View(**view) for view in fields['views'])
    if fields['predictor_view']:
      values['predictor_view'] = View(**fields['predictor_view'])
    return cls(**values)

  def to_json(self) -> dict[str, Any]:
    """As plain lists and numbers."""
    return dataclasses.asdict(self)

  @property
  def costs(self) -> Costs:
    """In GMACs."""
    return Costs(
      'GMACs', self.gmacs, self.predictor_gmacs, 'multiply-adds of the jaxpr'
    )

  @property
  def as_trained(self) -> Policy:
    """The router as it was trained; without one, the most expensive option."""
    if len(self.routes) > 1:
      return policy_lib.router(self.costs, self.routes)
    return policy_lib.fixed(self.gmacs.index(self.costs.full))

  @property
  def decode_px(self) -> int:
    """Short side that the most demanding view takes."""
    return max(view.short_px for view in self.views)


def is_export(folder: str) -> bool:
  """Whether a folder is what `package.write` wrote."""
  return os.path.exists(os.path.join(folder, FILE))


def read_fields(folder: str) -> dict[str, Any]:
  """The fields of an export's contract file, see `package.write`.

  Raises:
    UserError: it is damaged, or of another version.
  """
  path = os.path.join(folder, FILE)
  fields = settings.read_json(path)
  if 'options' not in fields:
    raise UserError(f'{path} is of another version: export the run again')
  return fields


def read(folder: str) -> tuple[Contract, Policy, dict[str, Any]]:
  """Of an export: its contract, the usual policy, and all fields.

  Raises:
    UserError: as `read_fields`.
  """
  fields = read_fields(folder)
  try:
    return Contract.from_json(fields), _usual_policy(fields), fields
  except (KeyError, StopIteration, TypeError, ValueError) as error:
    path = os.path.join(folder, FILE)
    raise UserError(f'{path} is damaged: export the run again') from error


def _usual_policy(fields: Mapping[str, Any]) -> Policy:
  """What an export follows unless another policy is asked for."""
  row = next(row for row in fields['policies'] if row['family'] == 'usual')
  names = [field.name for field in dataclasses.fields(Policy)]
  # JSON knows no infinity: `package` writes numbers beyond [0, 1] instead.
  stop = [-np.inf if x < 0 else np.inf if x > 1 else x for x in row['stop']]
  return Policy.from_json({name: row[name] for name in names} | {'stop': stop})
