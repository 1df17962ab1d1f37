# SPDX-License-Identifier: Apache-2.0
"""Networks by name, and `create`, which makes a model from a config.

Two methods: DRNet, which chooses a size for an image before it looks closely,
and RANet, which looks more closely until it is sure. Both offer *options* of
rising cost, of which each image gets one.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drnet_jax import settings
from drnet_jax.errors import UserError
from drnet_jax.models import (
  efficientnet,
  mobilenet_v2,
  mobilenet_v4,
  random_choice,
  ranet_network,
  resnet,
  resolution_norm,
)
from drnet_jax.models.drnet import DRNet
from drnet_jax.models.ranet import RANet

Model = DRNet | RANet

# To XLA, of a program of a CPU that runs once: the same values, in half of the
# time that compiling usually takes.
_ONCE = {'xla_backend_optimization_level': 1}

NETWORKS = {
  **resnet.NETWORKS,
  **mobilenet_v2.NETWORKS,
  **mobilenet_v4.NETWORKS,
  **efficientnet.NETWORKS,
  'random': random_choice.RandomChoice,
}


def create(section: Mapping[str, Any], *, num_classes: int) -> Model:
  """Makes the model that `config.model` describes.

  Args:
    section: fields of `create_drnet`; or 'method': 'ranet' and those of
      `create_ranet`.
    num_classes: K, from the data set.

  Raises:
    UserError: a value that cannot work, named as in the config.
  """
  if not settings.is_section(section):
    raise UserError(
      f'config.model should be a section of fields, not {section!r}'
    )
  fields = dict(section)
  # Configs of DRNet are older than the choice.
  method = fields.pop('method', 'drnet')
  if not isinstance(method, str) or method not in METHODS:
    raise UserError(
      f'config.model.method = {method!r} is not one of {[*METHODS]}'
    )
  return settings.call(
    METHODS[method], fields, 'config.model', num_classes=num_classes
  )


def create_drnet(
  *,
  base: Mapping[str, Any],
  predictor: Mapping[str, Any] | None,
  predictor_px: settings.Pixels,
  image_px: settings.Pixels,
  resolutions: Sequence[settings.Pixels],
  resolution_aware_bn: bool,
  antialias: bool,
  mean: tuple[float, float, float],
  std: tuple[settings.Positive, settings.Positive, settings.Positive],
  num_classes: int,
) -> DRNet:
  """Makes a DRNet.

  Args:
    base: `{'network': name, **arguments}`; the name is a key of NETWORKS, or
      'package.module:Class' for any Linen network with a `num_classes` field
      and `__call__(images, *, train)`.
    predictor: the same, for the predictor; None for a network that is only to
      be run at fixed sizes.
    image_px: see `DRNet`, as for the rest; the paper's is the largest size.
    num_classes: K, from the data set.

  Raises:
    UserError: a value that cannot work, named as in the config.
  """
  sizes = tuple(resolutions)
  if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
    raise UserError(
      f'config.model.resolutions = {sizes} are not sizes in px, in ascending '
      'order and without repeats'
    )
  network = _network('base', base, num_classes, sizes[0])
  router = None
  if predictor is not None:
    router = _network('predictor', predictor, len(sizes), predictor_px)
  return DRNet(
    base=network,
    predictor=router,
    resolutions=sizes,
    predictor_px=predictor_px,
    image_px=image_px,
    resolution_aware_bn=resolution_aware_bn,
    antialias=antialias,
    mean=tuple(mean),
    std=tuple(std),
  )


def create_ranet(
  *,
  network: Mapping[str, Any],
  image_px: settings.Pixels,
  mean: tuple[float, float, float],
  std: tuple[settings.Positive, settings.Positive, settings.Positive],
  num_classes: int,
) -> RANet:
  """Makes a RANet.

  Args:
    network: fields of `ranet_network.ResolutionAdaptiveNetwork`, with or
      without a 'configuration' to begin with.
    image_px: see `RANet`, as for `mean` and `std`.
    num_classes: K, from the data set.

  Raises:
    UserError: a value that cannot work, named as in the config.
  """
  where = 'config.model.network'
  hints = _hints(ranet_network.ResolutionAdaptiveNetwork)
  hints['configuration'] = str
  if strange := sorted(network.keys() - hints.keys()):
    raise UserError(f'{where}.{strange[0]} is not a known field')
  settings.check_values(hints, network, where)
  try:
    made = ranet_network.configured(**network, num_classes=num_classes)
  except UserError as error:
    raise UserError(f'{where}.{error}') from error
  return RANet(made, image_px, tuple(mean), tuple(std))


def initial_weights(
  model: Model, seed: int, *, draw_base: bool = True
) -> tuple[Any, Any]:
  """Fresh (params, batch_stats), arrays of the host; see `DRNet.init`.

  That is where they are drawn, whatever devices there are: it takes hundreds of
  small programs, which run once, and which a GPU's compiler needs half a minute
  for.
  """
  try:
    host = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    host = None
  with jax.default_device(host):
    key = jax.random.key(seed)
    if isinstance(model, RANet):
      return jax.device_get(model.init(key))
    init = functools.partial(model.init, draw_base=draw_base)
    lowered = jax.jit(init).lower(key)
    return jax.device_get(lowered.compile(_ONCE if host else None)(key))


METHODS = {'drnet': create_drnet, 'ranet': create_ranet}


def _network(
  field: str, spec: Mapping[str, Any], outputs: int, size_px: int
) -> nn.Module:
  """A network by its section, which can run at a size."""
  where = f'config.model.{field}'
  arguments = dict(spec)
  name = arguments.pop('network', None)
  if isinstance(name, str) and name in NETWORKS:
    make = NETWORKS[name]
    hints = _hints(make)
  elif isinstance(name, str) and ':' in name:
    module, _, attribute = name.partition(':')
    try:
      make = getattr(importlib.import_module(module), attribute)
      hints = _hints(make)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
      raise UserError(f'{where}.network = {name!r}: {error}') from error
  else:
    raise UserError(
      f'{where}.network = {name!r} is neither one of {sorted(NETWORKS)} nor '
      "'package.module:Class'"
    )
  # What a name stands for is not to be changed under it: the depth of resnet18.
  fixed = set(getattr(make, 'keywords', ())) - {'dropout'}
  strange = sorted(arguments.keys() & fixed or arguments.keys() - hints.keys())
  if strange:
    raise UserError(
      f'{where}.{strange[0]} is not a field of network = {name!r}. For another '
      f'network replace the whole section: '
      f'--{where}="{{\'network\': {name!r}}}"'
    )
  settings.check_values(hints, arguments, where)
  try:
    network = make(num_classes=outputs, **arguments)
  except TypeError as error:
    raise UserError(f'{where}: {error}') from error
  shape = jax.ShapeDtypeStruct((1, size_px, size_px, 3), jnp.float32)
  try:
    resolution_norm.check_norms(network, shape)
  except (TypeError, ValueError, ArithmeticError) as error:
    raise UserError(f'{where} cannot run at {size_px} px: {error}') from error
  return network


def _hints(make: Callable) -> dict[str, Any]:
  """What the fields of a network are annotated with."""
  return {
    name: parameter.annotation
    for name, parameter in inspect.signature(make).parameters.items()
    if name not in ('num_classes', 'parent', 'name')
  }
