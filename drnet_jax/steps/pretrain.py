# SPDX-License-Identifier: Apache-2.0
"""Stage 1: every image at every candidate size, losses summed, no predictor.

With one candidate size this is ordinary training at a fixed size.
"""

import dataclasses

import jax
import jax.numpy as jnp

from drnet_jax import losses, settings
from drnet_jax import mesh as mesh_lib
from drnet_jax.models.drnet import DRNet
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.whole import WholeStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainObjective:
  """`config.<stage>.objective` of stage 1.

  Attributes:
    label_smoothing: see `losses.cross_entropy`.
    distill: share of what the smaller sizes learn that is what the largest one
      says of the image, in place of the label; 0 for the paper's loss. (As in
      RS-Net, arXiv:2007.09558, but for its ensemble of all sizes.)
  """

  label_smoothing: settings.BelowOne
  distill: settings.Share


class PretrainStep(WholeStep):
  """One step of stage 1; the model's sizes are the ones trained."""

  model_class = DRNet
  objective_class = PretrainObjective
  # Groups of parameters this step trains.
  trains = ('base', 'norm')

  def _train_step(self, state, batch, key):
    model = self._model
    key = jax.random.fold_in(key, state.step)
    params, stats = state.params, dict(state.batch_stats['norm'])
    whole = mesh_lib.gathered(params, self._mesh)
    grads = jax.tree.map(jnp.zeros_like, params)
    total, metrics = 0.0, {}
    targets = batch['label']

    # One gradient per size, not the gradient of the sum: the activations of a
    # size are gone before those of the next are made. The largest is the first,
    # to teach the others.
    for index, size_px in reversed([*enumerate(model.resolutions)]):
      name = model.norm_set(size_px)

      def loss_fn(shared, norm, stats, targets, size_px, key):
        logits, new_stats = model.classify(
          shared, norm, stats, batch['image'], size_px, train=True, key=key
        )
        loss = losses.cross_entropy(
          logits, targets, label_smoothing=self._objective.label_smoothing
        ).mean()
        return loss, (new_stats, logits)

      (loss, (stats[name], logits)), (shared, norm) = jax.value_and_grad(
        loss_fn, argnums=(0, 1), has_aux=True
      )(
        whole['base'],
        whole['norm'][name],
        stats[name],
        targets,
        size_px,
        jax.random.fold_in(key, index),
      )
      grads['base'] = jax.tree.map(jnp.add, grads['base'], shared)
      grads['norm'] = grads['norm'] | {
        name: jax.tree.map(jnp.add, grads['norm'][name], norm)
      }
      total += loss
      metrics[f'top1_r{size_px}'] = losses.right(logits, batch['label']).mean()
      if self._objective.distill and size_px == max(model.resolutions):
        targets = losses.blended(targets, logits, share=self._objective.distill)

    new_state = state_lib.advanced(
      state, self._optimizer, grads, state.batch_stats | {'norm': stats}
    )
    return new_state, {'loss': total} | metrics
