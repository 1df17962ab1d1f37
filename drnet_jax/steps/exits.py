# SPDX-License-Identifier: Apache-2.0
"""RANet's training: every image through all exits, losses summed.

Source: the authors' code of RANet (arXiv:2003.07326): unweighted, without
distillation.
"""

import dataclasses

import jax

from drnet_jax import losses, settings
from drnet_jax import mesh as mesh_lib
from drnet_jax.models.ranet import RANet
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.step import WholeStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitsObjective:
  """`config.<stage>.objective` of RANet's training.

  Attributes:
    label_smoothing: see `losses.cross_entropy`.
  """

  label_smoothing: settings.BelowOne


class ExitsStep(WholeStep):
  """One step of RANet's training."""

  model_class = RANet
  objective_class = ExitsObjective
  trains = ('network',)

  def _train_step(self, state, batch, key):
    del key  # nothing here is random
    labels = batch['label'][:, None]  # beside the axis of the exits
    whole = mesh_lib.gathered(state.params, self.mesh)

    def loss_fn(params):
      logits, stats = self.model.classify(
        params, state.batch_stats, batch['image'], train=True
      )
      each = losses.cross_entropy(
        logits, labels, label_smoothing=self.objective.label_smoothing
      )
      top1 = losses.right(logits, labels).mean(0)
      return each.mean(0).sum(), (stats, top1)

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (stats, top1)), grads = value_and_grad(whole)
    new_state = state_lib.advanced(state, self.optimizer, grads, stats)
    accuracies = {f'top1_exit{k}': x for k, x in enumerate(top1, start=1)}
    return new_state, {'loss': loss} | accuracies
