# SPDX-License-Identifier: Apache-2.0
"""Stage 2: predictor and base network together, only the chosen size is run.

A step is a few kinds of device program, so that XLA sees static shapes and no
size runs on an image that did not choose it:

    route     predictor on the global batch -> one-hot choice h, its pullback,
              and how many images of each device chose each size
    learn     once per size with takers: gather them into slots, classify with
              the size's norms -> gradients, new statistics, dL/dh
    explore   (gradient='all') every size on a share of the batch, forward only
    refresh   (statistics='fresh') sizes of few takers, on a share of the batch
    update    router loss -> pullback -> predictor gradients; optimiser

The host waits for one thing only, the counts that say which bucket of slots
each `learn` needs. Batch norm counts the global batch's takers of a size and
no padding, so any number of devices computes what one would: up to dropout, and
where each explores and refreshes a whole number of images.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from drnet_jax import losses, routing
from drnet_jax import mesh as mesh_lib
from drnet_jax.errors import UserError
from drnet_jax.models import resolution_norm
from drnet_jax.models.drnet import DRNet
from drnet_jax.steps import ahead
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.routed_objective import REFRESHED, RoutedObjective
from drnet_jax.steps.state import TrainState
from drnet_jax.steps.step import Step

Tree = Any


@struct.dataclass
class Routed:
  """What `route` decided for a batch."""

  choice: jax.Array  # int32 [B], index of the size each image runs at
  counts: jax.Array  # int32 [devices, R], images of each device at each size
  h: jax.Array  # [B, R], the one-hot choice
  p: jax.Array  # [B, R], the predictor's probabilities
  pullback: Callable  # from cotangents of (h, p) to the predictor's gradients
  stats: Tree  # the predictor's new batch statistics


@struct.dataclass
class Learned:
  """What the `learn` calls of a step add up."""

  shared: Tree  # gradients of the shared parameters
  dh: jax.Array  # [B, R], gradient of the mean cross-entropy by h
  loss: jax.Array  # sum over images of the cross-entropy, over B
  top1: jax.Array  # share of the batch classified correctly


class RoutedStep(Step):
  """One step of stage 2, of a model of at least two sizes.

  Raises:
    UserError: a value that cannot work.
  """

  model_class = DRNet
  objective_class = RoutedObjective
  trains = ('base', 'norm', 'predictor')

  def __post_init__(self):
    objective, mesh = self.objective, self.mesh
    objective.check_model(self.model)
    macs = self.model.macs()
    self._gmacs = jnp.asarray(macs.gmacs)
    self._predictor_gmacs = macs.predictor / 1e9
    costs = objective.costs
    self._costs = jnp.asarray(costs) if costs else self._gmacs
    self._tau, self._eta, self._target = objective.schedules(
      self.steps_per_epoch, float(self._costs.max())
    )
    local = self.batch_size // mesh.size
    explores = objective.gradient == 'all'
    num_explored = round(objective.explore * local) if explores else 0
    if explores and not num_explored:
      raise UserError(
        f'objective.explore = {objective.explore} of {local} images per device '
        'rounds to zero images'
      )
    # Places within a device's part of the batch.
    self._explored_at = routing.evenly_spread(num_explored, local)
    num_refreshed = max(round(REFRESHED * local), 1)
    self._refreshed_at = routing.evenly_spread(num_refreshed, local)
    self._ladder = routing.bucket_ladder(
      local,
      growth=objective.bucket_growth,
      platform=mesh_lib.platform(mesh),
    )

    replicated, by_batch = mesh_lib.replicated(mesh), mesh_lib.by_batch(mesh)
    self._replicated, self._by_batch = replicated, by_batch
    stored = self.shardings.params  # gradients lie as what they change
    self._stored_learned = Learned(
      stored['base'], by_batch, replicated, replicated
    )
    any_set = next(iter(stored['norm'].values()))
    self._route = ahead.Program(self._route_batch)
    self._learn = ahead.Program(
      self._learn_size,
      num_static=2,
      donate_argnums=(2, 3),
      out_shardings=(self._stored_learned, any_set, replicated),
    )
    self._explore = ahead.Program(
      self._explore_size, num_static=1, out_shardings=by_batch
    )
    self._refresh = ahead.Program(
      self._refresh_size, num_static=1, out_shardings=replicated
    )
    self._update = ahead.Program(
      self._update_state,
      donate_argnums=0,
      out_shardings=(self.shardings, replicated),
    )

  def compile(
    self,
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array | None = None,
  ) -> int:
    """Compiles ahead of the first step: every size and bucket.

    Args:
      state: of the first step.
      batch: of the first step.
      key: for steps like this one only (benchmarks): of buckets those are
        compiled that the batch needs with this key, which routes it once.

    Returns:
      How many programs lay in the persistent cache.
    """
    images, labels = batch['image'], batch['label']
    norms = state.batch_stats['norm']
    sizes = range(len(self.model.resolutions))
    with ahead.Compiling() as compiling:
      route = compiling(self._route, state, images, ahead.KEY)
      explored = [
        compiling(self._explore, j, state.params, state.batch_stats, images)
        for j in sizes
        if self._explored_at.size
      ]
      rungs = [self._ladder] * len(sizes)
      if key is not None:
        most = np.asarray(route.result()(state, images, key)[0].counts).max(0)
        rungs = [(routing.bucket(int(n), self._ladder),) for n in most]
      # What `learn` takes of `route`, without waiting until that is compiled.
      routed, learned, _ = self._route.trace(state, images, ahead.KEY).out_info
      learned, choice = mesh_lib.placed(
        (learned, routed.choice), (self._stored_learned, self._by_batch)
      )
      for j in sizes:
        of_size = self._of_size(j, state.params, norms)
        of_batch = images, labels, choice
        taken = learned, of_size[1], of_size, of_batch, ahead.KEY, state.step
        for rung in rungs[j]:
          compiling(self._learn, j, rung, *taken)
        if self.objective.statistics == 'fresh':
          compiling(self._refresh, j, of_size, images, ahead.KEY, state.step)
      # Last: it takes what `route` and `explore` are compiled to return.
      routed, learned, norm_grads = route.result().out_info
      explored = [logits.result().out_info for logits in explored]
      of_step = (routed, learned, norm_grads, norms, explored, labels)
      compiling(self._update, state, *of_step)
    return compiling.cached

  def __call__(
    self, state: TrainState, batch: dict[str, jax.Array], key: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step, as `WholeStep` does."""
    model = self.model
    images, labels = batch['image'], batch['label']
    routed, learned, norm_grads = self._route(state, images, key)
    explored = [
      self._explore(j, state.params, state.batch_stats, images)
      for j in range(len(model.resolutions))
      if self._explored_at.size
    ]
    # Dispatched before this wait, the exploring hides it.
    counts = np.asarray(routed.counts)
    most, few = counts.max(0), counts.sum(0) < REFRESHED * len(labels)

    before = state.batch_stats['norm']
    stats = dict(before)
    for j, size_px in enumerate(model.resolutions):
      name = model.norm_set(size_px)
      if most[j]:
        rung = routing.bucket(int(most[j]), self._ladder)
        learned, norm_grads[name], stats[name] = self._learn(
          j,
          rung,
          learned,
          norm_grads[name],
          self._of_size(j, state.params, stats),
          (images, labels, routed.choice),
          key,
          state.step,
        )
      if few[j] and self.objective.statistics == 'fresh':
        of_size = self._of_size(j, state.params, before)
        stats[name] = self._refresh(j, of_size, images, key, state.step)
    return self._update(
      state, routed, learned, norm_grads, stats, explored, labels
    )

  def _route_batch(self, state, images, key):
    """What a batch is routed to, and zeros for `learn` to add gradients to."""
    model = self.model
    key = jax.random.fold_in(key, state.step)
    noise_key, dropout_key = jax.random.split(key)

    def predict(params):
      logits, stats = model.predict(
        params,
        state.batch_stats['predictor'],
        images,
        train=True,
        key=dropout_key,
      )
      h = routing.straight_through(noise_key, logits, tau=self._tau(state.step))
      return (h, jax.nn.softmax(logits)), stats

    whole = mesh_lib.gathered(state.params['predictor'], self.mesh)
    (h, p), pullback, stats = jax.vjp(predict, whole, has_aux=True)
    counts = h.reshape(self.mesh.size, -1, h.shape[-1]).sum(1)
    put = jax.lax.with_sharding_constraint
    routed = Routed(
      choice=put(h.argmax(-1).astype(jnp.int32), self._by_batch),
      counts=put(counts.astype(jnp.int32), self._replicated),
      h=h,
      p=p,
      pullback=pullback,
      stats=stats,
    )
    shared = jax.tree.map(jnp.zeros_like, state.params['base'])
    norm_grads = jax.tree.map(jnp.zeros_like, state.params['norm'])
    learned = Learned(
      shared, jnp.zeros_like(h), loss=jnp.zeros(()), top1=jnp.zeros(())
    )
    return (
      routed,
      put(learned, self._stored_learned),
      put(norm_grads, self.shardings.params['norm']),
    )

  def _learn_size(
    self, size_index, num_slots, learned, norm_grads, of_size, batch, key, step
  ):
    """Adds one size's images to `learned` and to its set's gradients.

    Returns these two, and the set's new statistics.
    """
    model, size_px = self.model, self.model.resolutions[size_index]
    batch_size = len(batch[0])
    dropout_key = _dropout_key(key, step, size_index)
    *weights, stats = of_size
    shared, norm = mesh_lib.gathered(weights, self.mesh)

    def gather(images, labels, choice):
      index, mask = routing.slots(choice, size_index, num_slots)
      return images[index], labels[index], index, mask

    def scatter(dh, values, index, mask):
      return dh.at[index, size_index].add(jnp.where(mask, values, 0.0))

    images, labels, index, mask = self._on_each_device(gather)(*batch)

    def loss_fn(shared, norm, h):
      logits, new_stats = model.classify(
        shared,
        norm,
        stats,
        images,
        size_px,
        train=self.objective.statistics != 'running',
        mask=mask,
        key=dropout_key,
      )
      # h is 1, and its gradient that of Eq. 4's chosen entry.
      loss = self.objective.cross_entropy(h[:, None] * logits, labels)
      right = losses.right(logits, labels) & mask
      total = jnp.where(mask, loss, 0.0).sum() / batch_size
      return total, (new_stats, right.sum() / batch_size)

    (loss, (new_stats, top1)), (d_shared, d_norm, dh) = jax.value_and_grad(
      loss_fn, argnums=(0, 1, 2), has_aux=True
    )(shared, norm, jnp.ones(labels.shape[:1]))
    learned = Learned(
      shared=jax.tree.map(jnp.add, learned.shared, d_shared),
      dh=self._on_each_device(scatter)(learned.dh, dh, index, mask),
      loss=learned.loss + loss,
      top1=learned.top1 + top1,
    )
    even_share = batch_size / len(model.resolutions)
    stats = resolution_norm.weighed(stats, new_stats, mask.sum(), even_share)
    return learned, jax.tree.map(jnp.add, norm_grads, d_norm), stats

  def _refresh_size(self, size_index, of_size, images, key, step):
    """New statistics of a size's norms, of images whatever they chose."""
    sizes = self.model.resolutions
    # Not the key that the size's own images have.
    key = _dropout_key(key, step, len(sizes) + size_index)
    images = self._on_each_device(lambda x: x[self._refreshed_at])(images)
    *weights, stats = of_size
    shared, norm = mesh_lib.gathered(weights, self.mesh)
    _, stats = self.model.classify(
      shared, norm, stats, images, sizes[size_index], train=True, key=key
    )
    return stats

  def _explore_size(self, size_index, params, batch_stats, images):
    """Logits of the explored images at one size, with running statistics."""
    size_px = self.model.resolutions[size_index]
    images = self._explored_part(images)
    params = mesh_lib.gathered(params, self.mesh)
    return self.model.logits_at(params, batch_stats, images, size_px)

  def _update_state(
    self, state, routed, learned, norm_grads, norm_stats, explored, labels
  ):
    step = state.step

    def router_loss(h, p):
      hinge = losses.flops_hinge(
        h, self._costs, target_gmacs=self._target(step)
      )
      if explored:
        task = self.objective.explored_loss(
          self._explored_part(h),
          self._explored_part(p),
          jnp.stack(explored, 1),
          self._explored_part(labels),
        )
      else:
        # Linear in h: its gradient is dL/dh, as `learn` measured it.
        task = (learned.dh * h).sum()
      loss = task + self._eta(step) * hinge
      loss += self.objective.usage_weight * losses.uniform_usage(h)
      return loss, hinge

    (_, hinge), cotangents = jax.value_and_grad(
      router_loss, argnums=(0, 1), has_aux=True
    )(routed.h, routed.p)
    (d_predictor,) = routed.pullback(cotangents)
    grads = {'base': learned.shared, 'norm': norm_grads}
    new_state = state_lib.advanced(
      state,
      self.optimizer,
      grads | {'predictor': d_predictor},
      {'norm': norm_stats, 'predictor': routed.stats},
      chosen=self._chosen_sets(routed.counts.sum(0) > 0),
    )
    share, p = routed.h.mean(0), routed.p
    metrics = {
      'loss': learned.loss + self._eta(step) * hinge,
      'cross_entropy': learned.loss,
      'top1': learned.top1,
      'hinge': hinge,
      # As in every report, and not as in the hinge, the predictor is counted.
      'gmacs': share @ self._gmacs + self._predictor_gmacs,
      'entropy': -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1).mean(),
    }
    for j, size_px in enumerate(self.model.resolutions):
      metrics[f'share_r{size_px}'] = share[j]
    return new_state, metrics

  def _chosen_sets(self, has_takers):
    """Which sets of norms any image uses, from a bool of each size."""
    chosen = {}
    for size_px, has in zip(self.model.resolutions, has_takers, strict=True):
      name = self.model.norm_set(size_px)
      chosen[name] = chosen.get(name, False) | has
    return chosen

  def _explored_part(self, x):
    """The images to explore with, of each device as many: a random part."""
    return self._on_each_device(lambda x: x[self._explored_at])(x)

  def _on_each_device(self, function):
    """`function` on each device's own part of batch-sharded arrays."""
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=mesh_lib.BATCH,
      out_specs=mesh_lib.BATCH,
    )

  def _of_size(self, size_index, params, norm_stats):
    """What a size runs with: shared parameters, its norms, their statistics."""
    name = self.model.norm_set(self.model.resolutions[size_index])
    return params['base'], params['norm'][name], norm_stats[name]


def _dropout_key(key, step, number):
  return jax.random.fold_in(jax.random.fold_in(key, step), number)
