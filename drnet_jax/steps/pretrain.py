# SPDX-License-Identifier: Apache-2.0
"""Stage 1: every image at every candidate size, losses summed, no predictor.

With one candidate size this is ordinary training at a fixed size.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from drnet_jax import losses, settings
from drnet_jax import mesh as mesh_lib
from drnet_jax.models.drnet import DRNet
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.step import WholeStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainObjective:
  """`config.<stage>.objective` of stage 1.

  Attributes:
    label_smoothing: see `losses.cross_entropy`.
    distill: share of what a size learns that is what a teacher says of the
      image, in place of the label; 0 for the paper's loss. Of an image without
      a label it is all.
    teacher: 'largest': the largest size teaches the smaller ones. 'ensemble':
      the weighted mean of all sizes' logits teaches every size (RS-Net,
      arXiv:2007.09558), see `losses.ensemble`. 'ensemble_below': it teaches all
      but the largest, which learns from the labels alone. An ensemble keeps
      what all sizes computed until the mean is known: for sizes of 1, 1/2 and
      1/6 of the cost 1.7 times the memory of the largest.
  """

  label_smoothing: settings.BelowOne
  distill: settings.Share
  teacher: Literal['largest', 'ensemble', 'ensemble_below']


class PretrainStep(WholeStep):
  """One step of stage 1; the model's sizes are the ones trained."""

  model_class = DRNet
  objective_class = PretrainObjective
  trains = ('base', 'norm')

  def _train_step(self, state, batch, key):
    model = self.model
    key = jax.random.fold_in(key, state.step)
    params, stats = state.params, dict(state.batch_stats['norm'])
    whole = mesh_lib.gathered(params, self.mesh)
    grads = jax.tree.map(jnp.zeros_like, params)
    total, metrics = 0.0, {}
    labels = targets = batch['label']

    def forward(index, size_px):
      """A size, its set, its logits, and their pullback to the parameters."""
      name = model.norm_set(size_px)

      def classify(shared, norm):
        return model.classify(
          shared,
          norm,
          stats[name],
          batch['image'],
          size_px,
          train=True,
          key=jax.random.fold_in(key, index),
        )

      logits, pullback, stats[name] = jax.vjp(
        classify, whole['base'], whole['norm'][name], has_aux=True
      )
      return size_px, name, logits, pullback

    def loss_fn(logits, targets):
      return losses.cross_entropy(
        logits, targets, label_smoothing=self.objective.label_smoothing
      ).mean()

    # The largest is the first, to teach the others. One gradient per size, not
    # the gradient of the sum: what a size computed is gone before the next is
    # run, unless an ensemble has to wait for all of them.
    distill, kind = self.objective.distill, self.objective.teacher
    has_ensemble = distill and kind != 'largest'
    sizes = reversed([*enumerate(model.resolutions)])
    passes = (forward(index, size_px) for index, size_px in sizes)
    if has_ensemble:
      passes = [*passes]
      answers = jnp.stack([logits for _, _, logits, _ in passes])
      teacher = losses.ensemble(answers, labels)
    for size_px, name, logits, pullback in passes:
      is_largest = size_px == max(model.resolutions)
      if has_ensemble:
        share = 0.0 if kind == 'ensemble_below' and is_largest else distill
        targets = losses.blended(labels, teacher, share=share)
      loss, of_logits = jax.value_and_grad(loss_fn)(logits, targets)
      shared, norm = pullback(of_logits)
      grads['base'] = jax.tree.map(jnp.add, grads['base'], shared)
      grads['norm'] = grads['norm'] | {
        name: jax.tree.map(jnp.add, grads['norm'][name], norm)
      }
      total += loss
      right, known = losses.right(logits, labels), losses.has_label(labels)
      metrics[f'top1_r{size_px}'] = right.sum() / jnp.maximum(known.sum(), 1)
      if distill and not has_ensemble and is_largest:
        targets = losses.blended(labels, logits, share=distill)

    new_state = state_lib.advanced(
      state, self.optimizer, grads, state.batch_stats | {'norm': stats}
    )
    return new_state, {'loss': total} | metrics
