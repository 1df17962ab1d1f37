# SPDX-License-Identifier: Apache-2.0
"""Dynamic Resolution Network (Zhu et al., NeurIPS 2021, arXiv:2106.02898).

    image -> predictor -> log p over R candidate sizes -> one of them, r
    image -> resize to r -> base network with batch norms of r -> logits

The predictor looks at a small view of the image. The base network is one CNN:
its convolutions and its head are shared by all sizes, its batch norms are not
(`resolution_norm`). Only the chosen size is ever run. Training has two stages:

1. *pretrain*: the base network alone, every image at every size, losses summed
   (`steps.pretrain`).
2. *finetune*: base network and predictor together. The predictor's choice is a
   straight-through Gumbel-softmax sample, each image runs at the chosen size
   only, and a hinge on the average cost pulls towards smaller sizes
   (`steps.routed`).

At inference the choice is the argmax, without noise. `DRNet.__call__` is the
whole method in a dozen lines; all else computes the same without running the
sizes that were not chosen.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drnet_jax import flops, resize, routing
from drnet_jax.flops import Macs
from drnet_jax.models import layers, resolution_norm

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DRNet:
  """A base network, a predictor, and the sizes to choose from.

  Parameters are `{'base': shared, 'norm': {set: ...}, 'predictor': ...}` and
  batch statistics `{'norm': {set: ...}, 'predictor': ...}`, where a set is
  named after its size ('r112'), or 'all' with one set for all.

  Attributes:
    base: any Linen network, `(images [B, H, W, 3], *, train) -> [B, K]`.
    predictor: any Linen network, the same with R outputs; None for a network
      that is only run at fixed sizes.
    resolutions: candidate sizes in px, ascending.
    predictor_px: side of the predictor's view.
    image_px: side of the one crop that every size is resized from.
    resolution_aware_bn: private norms per size; False is the paper's ablation.
    antialias: low-pass before shrinking.
    mean, std: pixel statistics, for pixels in [0, 1].
  """

  base: nn.Module
  predictor: nn.Module | None
  resolutions: tuple[int, ...]
  predictor_px: int
  image_px: int
  resolution_aware_bn: bool
  antialias: bool
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def options(self) -> tuple[str, ...]:
    """What can be chosen among for an image, for people; ascending in cost."""
    return tuple(f'{size_px} px' for size_px in self.resolutions)

  def norm_set(self, size_px: int) -> str:
    """Name of the set of norms that a size uses."""
    return f'r{size_px}' if self.resolution_aware_bn else 'all'

  def __call__(
    self,
    params: Tree,
    batch_stats: Tree,
    images: jax.Array,
    key: jax.Array | None = None,
    *,
    tau: float = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """The figure above, dense: every size is run, and h picks one of them.

    To be read, and for tests to hold the rest against. Training minimises

        cross_entropy(logits, labels) + eta * flops_hinge(h, C)    (`losses`)

    Args:
      params, batch_stats: the whole trees.
      images: uint8 [B, image_px, image_px, 3].
      key: for the noise of training; None for inference.
      tau: temperature of the soft choice, in training.

    Returns:
      logits float32 [B, K] at the chosen sizes, and h [B, R], the choice.
    """
    train = key is not None
    noise, dropout = jax.random.split(key) if train else (None, None)
    predictor = params['predictor'], batch_stats['predictor']
    log_p, _ = self.predict(*predictor, images, train=train, key=dropout)
    if train:
      h = routing.straight_through(noise, log_p, tau=tau)
    else:
      h = jax.nn.one_hot(routing.choose(log_p), len(self.resolutions))
    logits = 0.0
    for j, size_px in enumerate(self.resolutions):
      x = self.view(images, size_px)  # resized
      weights = self.variables(params, batch_stats, size_px)  # norms of its own
      logits += h[:, j, None] * self.base.apply(weights, x, train=False)
    return logits, h

  def init(
    self, key: jax.Array, *, draw_base: bool = True
  ) -> tuple[Tree, Tree]:
    """Returns fresh (params, batch_stats); quickest when compiled.

    Without `draw_base` the base network's convolutions are zeros, for what is
    to have the weights of another.
    """
    base_key, predictor_key = jax.random.split(key)
    with contextlib.nullcontext() if draw_base else layers.shapes_alone():
      variables = self.base.init(
        base_key, self._blank(max(self.resolutions)), train=True
      )
    stats = variables.get('batch_stats', {})
    shared, norm = resolution_norm.split(variables['params'], stats)
    sets = [self.norm_set(r) for r in self.resolutions]
    predictor = {}
    if self.predictor is not None:
      predictor = self.predictor.init(
        predictor_key, self._blank(self.predictor_px), train=True
      )
    params = {
      'base': shared,
      'norm': dict.fromkeys(sets, norm),
      'predictor': predictor.get('params', {}),
    }
    batch_stats = {
      'norm': dict.fromkeys(sets, stats),
      'predictor': predictor.get('batch_stats', {}),
    }
    return params, batch_stats

  @functools.cached_property
  def shapes(self) -> tuple[Tree, Tree]:
    """Of what `init` returns, each a `jax.ShapeDtypeStruct`."""
    with layers.shapes_alone():
      return jax.eval_shape(self.init, jax.random.key(0))

  def view(self, images: jax.Array, size_px: int) -> jax.Array:
    """Images [B, H, H, 3] as a network reads them, see `resize`."""
    how = {'mean': self.mean, 'std': self.std, 'antialias': self.antialias}
    return resize.network_view(images, size_px, **how)

  def variables(self, params: Tree, batch_stats: Tree, size_px: int) -> Tree:
    """Of the base network at one size: shared weights, and the size's norms."""
    name = self.norm_set(size_px)
    return {
      'params': resolution_norm.merge(params['base'], params['norm'][name]),
      'batch_stats': batch_stats['norm'][name],
    }

  def classify(
    self,
    shared: Tree,
    norm: Tree,
    stats: Tree,
    images: jax.Array,
    size_px: int,
    *,
    train: bool,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, Tree]:
    """Runs the base network at one size.

    Args:
      shared: `params['base']`.
      norm: `params['norm'][norm_set(size_px)]`.
      stats: `batch_stats['norm'][norm_set(size_px)]`.
      images: uint8 [B, image_px, image_px, 3].
      size_px: one of `resolutions`.
      train: norms use, and move, the batch's statistics.
      mask: bool [B], False where an image is padding.
      key: for networks with dropout.

    Returns:
      logits float32 [B, K] and the set's new statistics.
    """
    weights = resolution_norm.merge(shared, norm), stats
    return self._apply(self.base, *weights, images, size_px, train, mask, key)

  def logits_at(
    self, params: Tree, batch_stats: Tree, images: jax.Array, size_px: int
  ) -> jax.Array:
    """Inference of the base network at one size: float32 [B, K].

    `params` and `batch_stats` are the whole trees, images as for `classify`.
    """
    variables = self.variables(params, batch_stats, size_px)
    logits = self.base.apply(variables, self.view(images, size_px), train=False)
    return logits.astype(jnp.float32)

  def all_logits(
    self, params: Tree, batch_stats: Tree, images: jax.Array
  ) -> jax.Array:
    """Inference at every size: float32 [B, R, K]; see `logits_at`."""
    weights = params, batch_stats
    every = [self.logits_at(*weights, images, r) for r in self.resolutions]
    return jnp.stack(every, axis=1)

  def predict(
    self,
    params: Tree,
    stats: Tree,
    images: jax.Array,
    *,
    train: bool,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, Tree]:
    """Runs the predictor.

    Args:
      params: `params['predictor']`.
      stats: `batch_stats['predictor']`.
      images, train, key: as for `classify`.

    Returns:
      logits float32 [B, R] (log p up to a constant) and new statistics.
    """
    return self._apply(
      self.predictor, params, stats, images, self.predictor_px, train, None, key
    )

  def macs(self) -> Macs:
    """Multiply-adds of one image, from the networks' jaxprs."""
    return self._macs

  @functools.cached_property
  def _macs(self) -> Macs:
    params, stats = self.shapes

    def count(network: nn.Module, variables: Tree, size_px: int) -> int:
      images = self._blank(size_px)
      with layers.shapes_alone():
        return flops.count_macs(network.apply, variables, images, train=False)

    predictor = 0
    if self.predictor is not None:
      own = {'params': params['predictor'], 'batch_stats': stats['predictor']}
      predictor = count(self.predictor, own, self.predictor_px)
    sizes = (
      count(self.base, self.variables(params, stats, r), r)
      for r in self.resolutions
    )
    return Macs(sizes=tuple(sizes), predictor=predictor)

  def _apply(self, network, params, stats, images, size_px, train, mask, key):
    with resolution_norm.masked_norms(mask if train else None):
      logits, new = network.apply(
        {'params': params, 'batch_stats': stats},
        self.view(images, size_px),
        train=train,
        mutable=['batch_stats'] if train else [],
        rngs=None if key is None else {'dropout': key},
      )
    return logits.astype(jnp.float32), new.get('batch_stats', stats)

  def _blank(self, size_px: int) -> jax.Array:
    return jnp.zeros((1, size_px, size_px, 3))
