# SPDX-License-Identifier: Apache-2.0
"""What stage 2 minimises: the task's loss, and what routing costs."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from drnet_jax import losses, settings
from drnet_jax.errors import UserError
from drnet_jax.models.drnet import DRNet
from drnet_jax.steps import optim

REFRESHED = 1 / 8  # of a batch; its images are run forward only


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedObjective:
  """`config.<stage>.objective` of a routed stage.

  Attributes:
    label_smoothing: see `losses.cross_entropy`.
    gradient: how the task reaches the router. 'chosen': h's chosen entry only,
      dL/dh_j* = <dL/dy, F_j*(x)>, the paper's. 'all': every entry, by running
      the other sizes forward on a share of the batch.
    explore: that share, in (0, 1]; unused by 'chosen'.
    loss: with 'all', the loss on those images. 'mixture': cross-entropy of
      sum_j h_j F_j(x), Eq. 4 read densely. 'expected': sum_j p_j CE_j.
    statistics: what the base network's norms use. 'batch': means and variances
      of the images that chose the size; the running ones follow, see
      `resolution_norm.weighed`. 'fresh': the same, but the running statistics
      of a size that less than `REFRESHED` of the batch chose follow that
      share of the batch, whatever those images chose.
      'running': those the stage began with, which stay (no dropout either).
    tau: temperature of the soft choice at the start and at the end of
      `tau_epochs`; geometric in between.
    tau_epochs: see `tau`.
    eta: weight of the FLOPs hinge.
    eta_warmup_epochs: over which the weight grows linearly from 0.
    target_gmacs: alpha of the hinge, predictor not counted; in the unit of
      `costs` where they are given.
    target_epochs: over which alpha falls linearly from the cost of the most
      expensive size.
    usage_weight: of AR-Net's uniform-usage loss.
    bucket_growth: see `routing.bucket_ladder`.
    costs: C_j of the hinge at each size, for instance `costs.ms.options` of the
      `calibration.json` that `drnet_jax calibrate --measure` leaves; () for
      GMACs.
  """

  label_smoothing: settings.BelowOne
  gradient: Literal['chosen', 'all']
  explore: Annotated[float, settings.In('(0, 1]')]
  loss: Literal['mixture', 'expected']
  statistics: Literal['batch', 'fresh', 'running']
  tau: tuple[settings.Positive, settings.Positive]
  tau_epochs: settings.Epochs
  eta: settings.NotNegative
  eta_warmup_epochs: settings.Epochs
  target_gmacs: settings.NotNegative
  target_epochs: settings.Epochs
  usage_weight: settings.NotNegative
  bucket_growth: Annotated[float, settings.In('(1, 1000]')]
  costs: Sequence[settings.Positive]

  def check_model(self, model: DRNet) -> None:
    """Raises UserError unless a model can be trained so."""
    sizes = model.resolutions
    if len(sizes) < 2:
      raise UserError(
        f'config.model.resolutions = {sizes}: a predictor needs at least two '
        'sizes to choose from'
      )
    if model.predictor is None:
      raise UserError(
        'config.model.predictor is None: a routed stage needs a predictor'
      )
    if self.statistics == 'fresh' and not model.resolution_aware_bn:
      raise UserError(
        "objective.statistics = 'fresh' needs config.model.resolution_aware_bn:"
        ' one set of norms for all sizes is always in use'
      )
    if self.costs and len(self.costs) != len(sizes):
      raise UserError(
        f'objective.costs = {tuple(self.costs)} is not one cost for each of '
        f'{sizes}'
      )
    if self.costs and len(set(self.costs)) == 1:
      raise UserError('objective.costs are all the same: nothing to choose by')
    if len(set(model.macs().gmacs)) == 1:
      raise UserError(
        f'config.model.resolutions = {sizes}: all take the same multiply-adds, '
        'there is nothing to choose by'
      )

  def schedules(
    self, steps_per_epoch: int, full_cost: float
  ) -> tuple[optax.Schedule, optax.Schedule, optax.Schedule]:
    """tau, eta and alpha by the step; alpha begins at the full cost."""

    def steps(epochs: float) -> int:
      return round(epochs * steps_per_epoch)

    start, end = self.tau
    length = max(steps(self.tau_epochs), 1)
    return (
      optax.exponential_decay(start, length, end / start, end_value=end),
      optim.ramp(0.0, self.eta, steps(self.eta_warmup_epochs)),
      optim.ramp(full_cost, self.target_gmacs, steps(self.target_epochs)),
    )

  def cross_entropy(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Per image, see `losses.cross_entropy`."""
    return losses.cross_entropy(
      logits, labels, label_smoothing=self.label_smoothing
    )

  def explored_loss(
    self, h: jax.Array, p: jax.Array, logits: jax.Array, labels: jax.Array
  ) -> jax.Array:
    """The task's loss, a scalar, on images that every size was run on.

    Args:
      h: [B, R], the one-hot choice.
      p: [B, R], the predictor's probabilities.
      logits: [B, R, K].
      labels: see `losses.cross_entropy`.
    """
    if self.loss == 'mixture':
      mixed = jnp.einsum('br,brk->bk', h, logits)
      return self.cross_entropy(mixed, labels).mean()
    each = self.cross_entropy(logits, labels[:, None])
    return (p * each).sum(-1).mean()
