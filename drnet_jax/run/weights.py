# SPDX-License-Identifier: Apache-2.0
"""Weights from another run or from PyTorch, and back to PyTorch."""

from collections.abc import Mapping, Sequence

import jax
import ml_collections
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import models, settings, terminal
from drnet_jax.data import classes
from drnet_jax.data.pipeline import Data
from drnet_jax.data.selection import Some
from drnet_jax.errors import NotHeldOut, UserError
from drnet_jax.models import Model, layers, torch_weights
from drnet_jax.models.drnet import DRNet
from drnet_jax.run import checkpoint, hub, paths, workdir
from drnet_jax.run.checkpoint import Checkpoints
from drnet_jax.steps.state import Weights


def load(
  origin: str,
  model: Model,
  fresh: Weights,
  mesh: Mesh,
  *,
  class_names: Sequence[str],
  reset_head: bool,
) -> Weights:
  """Reads the weights to begin with.

  Args:
    origin: a workdir, whose latest weights are taken (those of the predictor
      only if it has been trained); or weights under PyTorch's names (`hub`),
      which go to the base network, its norms to every size. An untrained
      predictor may begin with them too, see `begin_predictor`.
    model: to load them into.
    fresh: of the model, as initialised; of the base only the classifier may
      be used.
    mesh: devices to put them on.
    class_names: of the model; a workdir's must be the same.
    reset_head: keep the fresh classifier (of the base network), for other
      classes.

  Returns:
    (params, batch_stats), replicated.

  Raises:
    UserError: the weights cannot be read, or are not the model's.
  """
  has_router = False
  if hub.is_weights(origin):
    found = _from_torch(origin, model, fresh, reset_head=reset_head)
  else:
    trained = workdir.load(origin, mesh)
    params, has_router = trained.params, trained.has_router
    differ = classes.difference(trained.class_names, class_names)
    if differ and not reset_head:
      raise UserError(
        f'config.init_from = {origin!r} has learned other classes: {differ}. '
        'Keep all but its classifier with --config.reset_head=True, or give '
        'the data its names (config.data.class_map)'
      )
    if reset_head:
      if layers.HEAD not in fresh[0].get('base', {}):
        raise UserError(
          f'config.reset_head: the base network has no layer {layers.HEAD!r}'
        )
      head = {layers.HEAD: fresh[0]['base'][layers.HEAD]}
      params = params | {'base': params.get('base', {}) | head}
    found = params, trained.batch_stats
    if isinstance(model, DRNet) and not has_router:
      # Theirs is untrained, and ours may be another network.
      found = tuple(
        theirs | {'predictor': ours['predictor']}
        for theirs, ours in zip(found, fresh, strict=True)
      )
    _check_same_shapes(origin, found, fresh)
    terminal.say(f'Weights from {origin}, {trained.origin}')
  if not has_router:
    found = begin_predictor(model, found)
  return jax.device_put(found, mesh_lib.replicated(mesh))


def check_unseen(origin: str, data: Data, splits: Mapping[str, Some]) -> None:
  """Checks that weights to begin with have not seen what is held out now.

  Args:
    origin: see `load`; of weights under PyTorch's names nothing is known.
    data: of the run that is to begin.
    splits: images that are set aside of its training images, by their split.

  Raises:
    NotHeldOut: a run on the same images was trained on some.
  """
  if hub.is_weights(origin):
    return
  path = paths.root(origin)
  theirs = workdir.read_config(path).data
  same = ('name', 'data_dir', 'train_split')
  if any(theirs.get(field) != getattr(data, field) for field in same):
    return
  for split, examples in splits.items():
    try:
      workdir.check_held_out(path, examples)
    except NotHeldOut as error:
      raise NotHeldOut(
        f'config.init_from = {origin!r} was trained on images of {split!r}, '
        'which would look too good. Hold out what that run did '
        '(config.data.held_out), or begin with other weights'
      ) from error


def begin_predictor(model: Model, weights: Weights) -> Weights:
  """Begins an untrained predictor that is the base but for its outputs.

  It has the base's weights then, with the norms of the smallest size; its
  layer HEAD, and any other predictor, stays as it is.
  """
  if not isinstance(model, DRNet) or model.predictor is None:
    return weights
  params, batch_stats = weights
  base, predictor, ours = model.base, model.predictor, params['predictor']
  if (
    type(base) is not type(predictor)
    or predictor != base.clone(num_classes=predictor.num_classes)
    or layers.HEAD not in ours
  ):
    return weights
  begin = model.variables(params, batch_stats, min(model.resolutions))
  theirs = begin['params'] | {layers.HEAD: ours[layers.HEAD]}
  if checkpoint.differences(theirs, ours):
    return weights  # the number of outputs is also elsewhere
  return (
    params | {'predictor': theirs},
    batch_stats | {'predictor': begin['batch_stats']},
  )


def import_torch(
  config: ml_collections.ConfigDict, file: str, path: str
) -> None:
  """Makes a workdir of PyTorch weights.

  Args:
    config: of the model, see `train.Run`; its `init_from` is set to `file`.
    file: the weights, see `hub.read`.
    path: the workdir.

  Raises:
    UserError: the weights are not the model's, or the workdir is in use.
  """
  if workdir.has_run(path):
    raise UserError(f'{path} holds a run already: choose another --workdir')
  config = config.copy_and_resolve_references()
  config.init_from = file
  data = settings.call(Data, settings.field(config, 'data'), 'config.data')
  names = data.class_names()
  section = settings.field(config, 'model')
  model = models.create(section, num_classes=len(names))
  weights = _from_torch(
    file,
    model,
    models.initial_weights(
      model, settings.field(config, 'seed'), draw_base=False
    ),
    reset_head=settings.field(config, 'reset_head'),
  )
  workdir.begin(path, config, names)
  with Checkpoints(path, workdir.INITIAL, keep=1) as checkpoints:
    checkpoints.save_weights(0, *weights)


def export_torch(path: str, file: str, size_px: int, naming: str) -> None:
  """Writes a workdir's latest weights, with the norms of one size, for PyTorch.

  For `file` and `naming` see `torch_weights.write` and `to_state_dict`.

  Raises:
    UserError: as these two, or the model is not a DRNet of this size.
  """
  trained = workdir.load(path, mesh_lib.create(1))
  if not isinstance(trained.model, DRNet):
    raise UserError(f'{path}: only a DRNet can be written for PyTorch')
  state = torch_weights.export(
    trained.model, trained.params, trained.batch_stats, size_px, naming=naming
  )
  torch_weights.write(file, state)


def _from_torch(
  file: str, model: Model, fresh: Weights, *, reset_head: bool
) -> Weights:
  if not isinstance(model, DRNet):
    raise UserError(
      f'{file}: weights of PyTorch can be read for a DRNet only, and '
      f'config.model makes a {type(model).__name__}'
    )
  state = hub.read(file, model)
  weights = torch_weights.load(model, *fresh, state, reset_head=reset_head)
  terminal.say(f'Weights from {file}, the norms copied to every size')
  return weights


def _check_same_shapes(origin: str, found: Weights, ours: Weights) -> None:
  for there, here in zip(found, ours, strict=True):
    if different := checkpoint.differences(there, here):
      raise UserError(
        f'config.init_from = {origin!r} holds another model: {different}'
      )
