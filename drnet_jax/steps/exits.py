# SPDX-License-Identifier: Apache-2.0
"""RANet's training: every image through all exits, losses summed.

Source: the authors' code of RANet (arXiv:2003.07326): unweighted, without
distillation.
"""

import jax
import optax
from jax.sharding import Mesh

from drnet_jax import losses
from drnet_jax import mesh as mesh_lib
from drnet_jax.models.ranet import RANet
from drnet_jax.steps import ahead
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.state import TrainState


class ExitsStep:
  """One step, compiled once.

  Args:
    model: to train.
    optimizer: over the whole parameter tree.
    mesh: devices to run on.
    batch_size, steps_per_epoch: unused; schedules are the optimiser's.
    label_smoothing: see `losses.cross_entropy`.
  """

  model_class = RANet
  # Groups of parameters this step trains.
  trains = ('network',)

  def __init__(
    self,
    model: RANet,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    batch_size: int,
    steps_per_epoch: int,
    label_smoothing: float,
  ):
    del batch_size, steps_per_epoch
    self._model = model
    self._optimizer = optimizer
    self._label_smoothing = label_smoothing
    self._mesh = mesh
    shardings = mesh_lib.shardings(state_lib.abstract(model, optimizer), mesh)
    self._step = ahead.Program(
      self._train_step,
      donate_argnums=0,
      out_shardings=(shardings, mesh_lib.replicated(mesh)),
    )

  def compile(self, state: TrainState, batch: dict[str, jax.Array]) -> None:
    """Compiles ahead of the first step."""
    with ahead.Compiling() as compiling:
      compiling(self._step, state, batch)

  def __call__(
    self, state: TrainState, batch: dict[str, jax.Array], key: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step.

    Args:
      state: donated.
      batch: 'image' uint8 [B, H, H, 3] and 'label' int [B] or float [B, K],
        sharded by batch.
      key: unused, nothing here is random.

    Returns:
      The new state and scalar metrics, still on the device.
    """
    del key
    return self._step(state, batch)

  def _train_step(self, state, batch):
    labels = batch['label'][:, None]  # beside the axis of the exits
    whole = mesh_lib.gathered(state.params, self._mesh)

    def loss_fn(params):
      logits, stats = self._model.classify(
        params, state.batch_stats, batch['image'], train=True
      )
      each = losses.cross_entropy(
        logits, labels, label_smoothing=self._label_smoothing
      )
      top1 = losses.right(logits, labels).mean(0)
      return each.mean(0).sum(), (stats, top1)

    (loss, (stats, top1)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      whole
    )
    new_state = state_lib.advanced(state, self._optimizer, grads, stats)
    accuracies = {f'top1_exit{k}': x for k, x in enumerate(top1, start=1)}
    return new_state, {'loss': loss} | accuracies
