# SPDX-License-Identifier: Apache-2.0
"""What everyone who runs a trained model must agree on, besides its weights."""

import dataclasses
from typing import Any

from drnet_jax import settings
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError
from drnet_jax.models import Model
from drnet_jax.run import workdir

DECODINGS = ('full', 'scaled')


@dataclasses.dataclass(frozen=True)
class Contract:
  """How images become inputs, what the outputs mean, what each size costs.

  Attributes:
    image_px: side of the crop that every size is resized from.
    resize_px: short side of the image before that crop.
    keep_aspect: False where the image is squashed to a square of that side.
    resolutions: candidate sizes in px, ascending.
    predictor_px: side of the predictor's view; 0 without one.
    decode: 'full': a file is decoded whole and every network is given the crop
      of image_px. 'scaled': every network is given a crop of its own size, and
      a JPEG is decoded at twice what the largest size takes, where it can.
    gmacs: cost of the base network at each size (of a network with exits, up
      to each exit), in 1e9 multiply-adds.
    predictor_gmacs: cost of the predictor.
    class_names: in label order.
    origin: which weights, for people.
  """

  image_px: int
  resize_px: int
  keep_aspect: bool
  resolutions: tuple[int, ...]
  predictor_px: int
  decode: str
  gmacs: tuple[float, ...]
  predictor_gmacs: float
  class_names: tuple[str, ...]
  origin: str

  def __post_init__(self):
    if self.decode not in DECODINGS:
      raise UserError(f'decode = {self.decode!r} is not one of {DECODINGS}')

  @classmethod
  def of(cls, trained: workdir.Trained, *, decode: str = 'full') -> 'Contract':
    """That of a trained model."""
    data = settings.call(Data, trained.config.data, 'config.data')
    return cls.of_model(
      trained.model,
      resize_px=data.resize_px,
      keep_aspect=data.keep_aspect,
      has_router=trained.has_router,
      decode=decode,
      class_names=trained.class_names,
      origin=trained.origin,
    )

  @classmethod
  def of_model(
    cls,
    model: Model,
    *,
    resize_px: int,
    keep_aspect: bool,
    has_router: bool,
    decode: str,
    class_names: tuple[str, ...],
    origin: str,
  ) -> 'Contract':
    """That of a model; `resize_px` 0 for no margin around the crop."""
    macs = model.macs()
    return cls(
      image_px=model.image_px,
      resize_px=resize_px or model.image_px,
      keep_aspect=keep_aspect,
      resolutions=getattr(model, 'resolutions', (model.image_px,)),
      predictor_px=model.predictor_px if has_router else 0,
      decode=decode,
      gmacs=macs.gmacs,
      predictor_gmacs=has_router * macs.predictor / 1e9,
      class_names=class_names,
      origin=origin,
    )

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> 'Contract':
    """Inverse of `to_json`."""
    names = [field.name for field in dataclasses.fields(cls)]
    values = {name: fields[name] for name in names}
    return cls(
      **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )

  def to_json(self) -> dict[str, Any]:
    """As plain lists and numbers."""
    return dataclasses.asdict(self)

  @property
  def has_router(self) -> bool:
    """Whether there is a predictor."""
    return self.predictor_px > 0

  def input_px(self, size_px: int) -> int:
    """Side of the image given to a network whose own size is `size_px`."""
    return self.image_px if self.decode == 'full' else size_px

  def short_px(self, crop_px: int) -> int:
    """Short side of an image before the central crop of this side."""
    return max(round(self.resize_px * crop_px / self.image_px), crop_px)
