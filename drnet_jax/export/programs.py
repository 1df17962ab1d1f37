# SPDX-License-Identifier: Apache-2.0
"""The functions that a trained model is at inference, one for each option."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from drnet_jax.errors import UserError
from drnet_jax.export.contract import PREDICTOR, Contract
from drnet_jax.models.drnet import DRNet
from drnet_jax.run import workdir


class Program(NamedTuple):
  """A function of (weights, images), and what it is called with.

  Attributes:
    function: to float32 [B, K], the probabilities of the classes; of the
      predictor [B, R], log-probabilities of the options.
    weights: its own part of the model's.
    side_px: of the images, uint8 [B, side_px, side_px, 3].
  """

  function: Callable
  weights: Any
  side_px: int


def programs(
  trained: workdir.Trained, contract: Contract
) -> dict[str, Program]:
  """The programs of a DRNet by name: the predictor's, if any, and each size's.

  Raises:
    UserError: a network with exits.
  """
  model, params, stats = trained.model, trained.params, trained.batch_stats
  if not isinstance(model, DRNet):
    raise UserError(
      'a network with exits cannot be exported: what an exit hands to the next '
      'is dozens of arrays, and graphs here have one input and one output'
    )
  found = {}
  if contract.routes:
    weights = tuple({'predictor': x['predictor']} for x in (params, stats))
    side_px = contract.predictor_view.side_px
    found[PREDICTOR] = Program(
      functools.partial(_log_p, model), weights, side_px
    )
  for name, size_px, view in zip(
    contract.programs, contract.sizes_px, contract.views, strict=True
  ):
    norm = model.norm_set(size_px)
    own_params, own_stats = (
      {'norm': {norm: x['norm'][norm]}} for x in (params, stats)
    )
    found[name] = Program(
      functools.partial(_probabilities, model, size_px),
      ({'base': params['base']} | own_params, own_stats),
      view.side_px,
    )
  return found


def of_ladder(
  members: Sequence[tuple[workdir.Trained, Contract]], ladder: Contract
) -> dict[str, Program]:
  """The programs of one or several models, by the names in their contract."""
  found, names = {}, iter(ladder.programs)
  for trained, contract in members:
    for name, program in programs(trained, contract).items():
      if name == PREDICTOR:
        found.setdefault(PREDICTOR, program)  # the first of the ladder
      else:
        found[next(names)] = program
  return found


def _log_p(model: DRNet, weights, images: jax.Array) -> jax.Array:
  params, batch_stats = weights
  logits, _ = model.predict(
    params['predictor'], batch_stats['predictor'], images, train=False
  )
  return jax.nn.log_softmax(logits)


def _probabilities(model: DRNet, size_px: int, weights, images: jax.Array):
  return jax.nn.softmax(model.logits_at(*weights, images, size_px))
