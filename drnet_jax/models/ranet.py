# SPDX-License-Identifier: Apache-2.0
"""RANet (Yang et al., CVPR 2020, arXiv:2003.07326): exits of rising cost.

    image -> sub-network on a coarse map -> exit 1, exit 2
                 | features
             sub-network on a finer map  -> exit 3, exit 4
                 | features
             ...

One network with a classifier after each of several stages. An image leaves at
the first exit that is confident enough; nothing after it is run for that image.
All exits are trained together (`steps.exits`).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drnet_jax import resize
from drnet_jax.flops import Macs
from drnet_jax.models import layers, ranet_blocks, ranet_network
from drnet_jax.models.ranet_network import ResolutionAdaptiveNetwork, State

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RANet:
  """A network with exits, and what becomes of pixels before it.

  Parameters are `{'network': ...}`, and so are batch statistics.

  Attributes:
    network: see there.
    image_px: side of the images.
    mean, std: pixel statistics, for pixels in [0, 1].
  """

  network: ResolutionAdaptiveNetwork
  image_px: int
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def options(self) -> tuple[str, ...]:
    """What can be chosen among for an image, for people; ascending in cost."""
    return tuple(f'exit {k}' for k in range(1, self.network.num_exits + 1))

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """Returns fresh (params, batch_stats); quickest when not compiled."""
    blank = jnp.zeros((1, self.image_px, self.image_px, 3))
    init = functools.partial(self.network.init, train=True)
    with layers.shapes_alone():
      shapes = jax.eval_shape(init, key, blank)
    fresh = ranet_network.initial(key, shapes)
    return {'network': fresh['params']}, {'network': fresh['batch_stats']}

  @functools.cached_property
  def shapes(self) -> tuple[Tree, Tree]:
    """Of what `init` returns, each a `jax.ShapeDtypeStruct`."""
    with layers.shapes_alone():
      return jax.eval_shape(self.init, jax.random.key(0))

  def classify(
    self, params: Tree, batch_stats: Tree, images: jax.Array, *, train: bool
  ) -> tuple[jax.Array, Tree]:
    """Runs all exits.

    Args:
      params, batch_stats: the whole trees.
      images: uint8 [B, image_px, image_px, 3].
      train: norms use, and move, the batch's statistics.

    Returns:
      logits float32 [B, E, K] and new batch statistics.
    """
    logits, new = self.network.apply(
      _variables(params, batch_stats),
      self._view(images),
      train=train,
      mutable=['batch_stats'] if train else [],
    )
    stats = {'network': new['batch_stats']} if train else batch_stats
    return logits, stats

  def all_logits(
    self, params: Tree, batch_stats: Tree, images: jax.Array
  ) -> jax.Array:
    """Inference at every exit: float32 [B, E, K]; see `classify`."""
    return self.classify(params, batch_stats, images, train=False)[0]

  def stage(
    self,
    exit_number: int,
    params: Tree,
    batch_stats: Tree,
    state: jax.Array | State,
  ) -> tuple[jax.Array, State]:
    """Inference from one exit to the next.

    Args:
      exit_number: to reach, from 1.
      params, batch_stats: as from `stage_weights`, or the whole trees.
      state: after the exit before; for the first, uint8 images.

    Returns:
      logits float32 [B, K], and the state after the exit.
    """
    if exit_number == 1:
      state = self._view(state)
    weights = _variables(params, batch_stats)
    return self.network.apply(
      weights, exit_number, state, train=False, method='stage'
    )

  def stage_weights(
    self, exit_number: int, params: Tree, batch_stats: Tree
  ) -> tuple[Tree, Tree]:
    """The part of the trees that one stage needs."""
    names = {f'exit{exit_number}'} | {
      f'scale{plan.scale}_block{plan.index}'
      for plan in self.network.stage_plan(exit_number)
    }
    if exit_number == 1:
      names.add('stem')
    return tuple(
      {'network': {k: v for k, v in tree['network'].items() if k in names}}
      for tree in (params, batch_stats)
    )

  def macs(self) -> Macs:
    """Multiply-adds of one image up to each exit, all exits before counted."""
    sizes = tuple(macs for macs, _ in self.macs_and_parameters)
    return Macs(sizes=sizes, predictor=0)

  @functools.cached_property
  def macs_and_parameters(self) -> list[tuple[int, int]]:
    """Multiply-adds and parameters up to each exit, as the authors count them.

    A ReLU counts one for each element, a pooling the size of its window for
    each element it makes, a dense layer its biases too; norms, resizing and the
    biases of convolutions count nothing. So the figures can be held against
    theirs; a plain count of the multiply-adds gives a little less.
    """
    macs, parameters, at_exits = 0, 0, []

    def tally(call, args, kwargs, context):
      nonlocal macs, parameters
      y, module = call(*args, **kwargs), context.module
      params = module.variables.get('params', {})
      if isinstance(module, nn.Conv | nn.Dense | nn.BatchNorm):
        parameters += sum(p.size for p in params.values())
      if isinstance(module, nn.Conv):
        macs += y.size * params['kernel'].size // y.shape[-1]
      elif isinstance(module, nn.Dense):
        macs += sum(p.size for p in params.values())
      elif isinstance(module, nn.BatchNorm):
        macs += y.size  # of the ReLU behind it
      elif isinstance(module, ranet_blocks.MaxPool):
        macs += 9 * y.size
      elif isinstance(module, ranet_blocks.Mean):
        macs += args[0].size
      elif isinstance(module, ranet_blocks.Exit):
        at_exits.append((macs, parameters))
      return y

    with nn.intercept_methods(tally):
      jax.eval_shape(self.init, jax.random.key(0))
    return at_exits

  def _view(self, images: jax.Array) -> jax.Array:
    return resize.network_view(
      images, self.image_px, mean=self.mean, std=self.std, antialias=True
    )


def _variables(params: Tree, batch_stats: Tree) -> Tree:
  return {'params': params['network'], 'batch_stats': batch_stats['network']}
