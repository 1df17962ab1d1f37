# SPDX-License-Identifier: Apache-2.0
"""Optimisers and learning-rate schedules, all Optax, from config values."""

import functools
from collections.abc import Collection
from typing import Annotated, Literal

import jax
import optax
from optax import contrib

from drnet_jax import settings
from drnet_jax.models.layers import HEAD


def schedule(
  *,
  kind: Literal['step', 'halfway', 'cosine'],
  lr: settings.NotNegative,
  warmup_epochs: settings.Epochs,
  epochs: float,
  decay_epochs: settings.Epochs,
  decay_factor: Annotated[float, settings.In('(0, 1]')],
  steps_per_epoch: int,
) -> optax.Schedule:
  """Learning rate as a function of the step.

  Args:
    kind: 'step' (times `decay_factor` every `decay_epochs`), 'halfway' (times
      `decay_factor` at 1/2 and again at 3/4 of `epochs`), or 'cosine' (to 0 at
      the end of `epochs`).
    lr: after the warm-up.
    warmup_epochs: linear from 0, counted within `epochs`.
    epochs: length of the stage.
    decay_epochs: only for 'step'; 0 for never.
    decay_factor: only for 'step' and 'halfway'.
    steps_per_epoch: steps in one epoch.
  """
  warmup = round(warmup_epochs * steps_per_epoch)
  total = max(round(epochs * steps_per_epoch), 1)
  if kind == 'cosine':
    after = optax.cosine_decay_schedule(lr, max(total - warmup, 1))
  else:
    if kind == 'halfway':
      marks = [max(round(epochs * x * steps_per_epoch), 1) for x in (0.5, 0.75)]
    else:
      every = max(round(decay_epochs * steps_per_epoch), 1)
      marks = range(every, total, every) if decay_epochs else ()
    # Counted from the first step of all, as the papers count their epochs.
    drops = {mark - warmup: decay_factor for mark in marks}
    after = optax.piecewise_constant_schedule(lr, drops)
  if not warmup:
    return after
  return optax.join_schedules(
    [optax.linear_schedule(0.0, lr, warmup), after], [warmup]
  )


def create(
  *,
  name: Literal['sgd', 'nesterov', 'adamw', 'muon'],
  momentum: settings.BelowOne,
  weight_decay: settings.NotNegative,
  decay_norms_and_biases: bool,
  clip_norm: settings.NotNegative,
  predictor_lr: settings.NotNegative,
  head_lr: settings.NotNegative,
  lr: optax.Schedule,
  trains: Collection[str],
  accumulate: int,
) -> optax.GradientTransformation:
  """Optimiser in which predictor and classifier have rates of their own.

  Args:
    name: 'sgd' (with `momentum`, weight decay added to the gradient as PyTorch
      does), 'nesterov', 'adamw' (`momentum` is b1, decoupled decay), or 'muon':
      every kernel's momentum made orthogonal, as a matrix of all its inputs by
      its outputs, at the length that AdamW's updates have, so that rates are
      alike (Liu et al., arXiv:2502.16982); AdamW for the rest: norms, biases
      and the classifiers, whose kernels decay as norms and biases do.
    momentum: of the optimiser.
    weight_decay: on every parameter, or only on kernels.
    decay_norms_and_biases: False spares everything of less than two axes.
    clip_norm: largest norm of each group's gradient; 0 switches it off.
    predictor_lr: the predictor's rate as a multiple of `lr`.
    head_lr: the same of the base network's classifier, its layer 'head': a
      fresh one on trained weights can do with more.
    lr: schedule of the rate.
    trains: top-level groups of the parameters to train; others stay frozen.
    accumulate: an update every so many steps, of their mean gradient.
  """

  def decayed(params):
    return jax.tree.map(lambda x: decay_norms_and_biases or x.ndim > 1, params)

  def rule(multiplier: float) -> optax.GradientTransformation:
    def rate(step):
      return multiplier * lr(step)

    if name in ('sgd', 'nesterov'):
      update = optax.chain(
        optax.add_decayed_weights(weight_decay, decayed),
        optax.sgd(rate, momentum, nesterov=name == 'nesterov'),
      )
    elif name == 'adamw':
      update = optax.adamw(
        rate, b1=momentum, weight_decay=weight_decay, mask=decayed
      )
    else:
      update = contrib.muon(
        rate,
        beta=momentum,
        weight_decay=weight_decay,
        adam_b1=momentum,
        adam_weight_decay=weight_decay if decay_norms_and_biases else 0.0,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
      )
    return _clipped(update, clip_norm) if clip_norm else update

  def group(path, _) -> str:
    top, *rest = (key.key for key in path)
    if top not in trains:
      return 'frozen'
    if top == 'base' and rest[0] == HEAD and head_lr != 1:
      return 'head'
    return 'predictor' if top == 'predictor' else 'network'

  rules = {
    'network': rule(1.0),
    'predictor': rule(predictor_lr),
    'frozen': optax.set_to_zero(),
  }
  if head_lr != 1:  # else as in older runs, whose checkpoints lack the group
    rules['head'] = rule(head_lr)
  optimizer = optax.multi_transform(
    rules, functools.partial(jax.tree_util.tree_map_with_path, group)
  )
  if accumulate == 1:
    return optimizer
  return optax.MultiSteps(optimizer, accumulate).gradient_transformation()


def _matrices(params):
  """Which axes of a kernel are inputs; None for what Muon leaves alone."""

  def axes(path, x):
    if x.ndim < 2 or any(key.key == HEAD for key in path):
      return None
    *inputs, outputs = range(x.ndim)
    return contrib.MuonDimensionNumbers(tuple(inputs), outputs)

  return jax.tree_util.tree_map_with_path(axes, params)


def _clipped(
  update: optax.GradientTransformation, norm: float
) -> optax.GradientTransformation:
  """Of clipped gradients; its state is the same, so a run may begin to clip."""
  clip = optax.clip_by_global_norm(norm)

  def clip_and_update(grads, state, params=None):
    clipped, _ = clip.update(grads, clip.init(params))
    return update.update(clipped, state, params)

  return optax.GradientTransformation(update.init, clip_and_update)


def ramp(start: float, end: float, steps: int) -> optax.Schedule:
  """Linear from `start` to `end` over `steps`, then constant."""
  if not steps:
    return optax.constant_schedule(end)
  return optax.linear_schedule(start, end, steps)
