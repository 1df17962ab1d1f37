# SPDX-License-Identifier: Apache-2.0
"""The network of RANet (Yang et al., CVPR 2020, arXiv:2003.07326), in Linen.

    image -> stem -> one base map per sub-network, coarse to fine
    sub-network 1: coarsest map -> blocks, each ending in an exit
    sub-network s: finer map -> fusion blocks, which read all that sub-network
                   s - 1 computed and come down to the coarsest side -> blocks,
                   each ending in one more exit

Sub-networks are numbered from the coarsest (and widest), 1 to S; blocks and
exits from 1, too. Follows the authors' PyTorch code, which departs from common
habits in the resizing (corners aligned, no low-pass) and in the padding
(symmetric at strides of 2).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from drnet_jax import settings
from drnet_jax.errors import UserError
from drnet_jax.models import layers
from drnet_jax.models.ranet_blocks import Block, BlockPlan, Exit, Stem, Taps

_CIFAR = {'stem': 'cifar', 'width': 16, 'growth': 6}
_BUDGETED = _CIFAR | {'layers': 2, 'lengthen': True}
_IMAGENET = {
  'stem': 'imagenet',
  'growth': 16,
  'levels': (1, 2, 3, 4),
  'factors': (4, 2, 2, 1),
  'layers': 8,
}

# The paper's models: 'anytime' its anytime results, the others its curves of
# budgeted batch classification. Widths and levels from the coarsest.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
  'cifar_anytime': _CIFAR
  | {'levels': (1, 2, 3, 3), 'factors': (4, 2, 1, 1), 'layers': 4},
  'cifar_budgeted_small': _BUDGETED
  | {'levels': (1, 2, 3), 'factors': (4, 2, 1)},
  'cifar_budgeted_medium': _BUDGETED
  | {'levels': (1, 2, 3, 3), 'factors': (4, 2, 1, 1)},
  'cifar_budgeted_large': _BUDGETED
  | {'levels': (1, 2, 2, 3), 'factors': (4, 2, 2, 1)},
  # Both an anytime and the larger budgeted model.
  'imagenet': _IMAGENET | {'width': 64},
  'imagenet_budgeted_small': _IMAGENET | {'width': 32},
  # Ours, for minutes on a CPU.
  'cifar_tiny': _CIFAR
  | {'levels': (1, 2, 3), 'factors': (4, 2, 1), 'layers': 2},
}


def configured(
  configuration: str = '', **arguments: Any
) -> 'ResolutionAdaptiveNetwork':
  """A network by the name of its configuration, by its fields, or by both.

  Args:
    configuration: a key of CONFIGURATIONS; '' for none.
    **arguments: fields of the network; they go before the configuration's.

  Raises:
    UserError: no such configuration, or fields that cannot work.
  """
  if configuration and configuration not in CONFIGURATIONS:
    raise UserError(
      f'configuration = {configuration!r} is not one of '
      f'{sorted(CONFIGURATIONS)}'
    )
  fields = CONFIGURATIONS.get(configuration, {}) | arguments
  fields = {
    k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
  }
  try:
    network = ResolutionAdaptiveNetwork(**fields)
  except TypeError as error:
    raise UserError(str(error)) from error
  network.check()
  return network


@struct.dataclass
class State:
  """All that is needed to go on after an exit; the batch is the first axis.

  Attributes:
    bases: base maps of the sub-networks to come.
    taps: of this sub-network's blocks, for the next one to read.
    x: the last block's output, unless a new sub-network begins.
  """

  bases: tuple[jax.Array, ...]
  taps: tuple[Taps, ...]
  x: jax.Array | None


class ResolutionAdaptiveNetwork(nn.Module):
  """RANet from [B, H, W, 3] to the logits of all exits, [B, E, K].

  Attributes:
    num_classes: K.
    stem: 'cifar' (3x3), or 'imagenet' (7x7 of stride 2, then a max-pool).
    width: channels of the finest base map, over its factor.
    growth: channels a layer adds, over its factor.
    factors: of width, growth and bottlenecks of each sub-network, coarsest
      first.
    levels: resolution of each sub-network: 1 is the coarsest, one more is twice
      the side.
    layers: in a block.
    lengthen: block j has j times as many ('lin_grow').
    first_blocks: in sub-network 1.
    more_blocks: that each sub-network has more than the one before, and exits.
    reduction: share of the channels that a transition keeps.
    compression: share of a fusion's new channels that is the coarser one's.
    dtype: of the computation; parameters, statistics and logits stay float32.
  """

  num_classes: int
  stem: Literal['cifar', 'imagenet']
  width: settings.Natural
  growth: settings.Natural
  factors: Sequence[settings.Natural]
  levels: Sequence[settings.Natural]
  layers: settings.Natural
  lengthen: bool = False
  first_blocks: settings.Natural = 2
  more_blocks: settings.Natural = 2
  reduction: Annotated[float, settings.In('(0, 1]')] = 0.5
  compression: Annotated[float, settings.In('(0, 1)')] = 0.25
  dtype: layers.DType = 'float32'

  @property
  def num_exits(self) -> int:
    """E, of all sub-networks together."""
    return self.num_blocks(len(self.levels))

  def num_blocks(self, scale: int) -> int:
    """In a sub-network; 0 in number 0."""
    return self.first_blocks + self.more_blocks * (scale - 1) if scale else 0

  def check(self) -> None:
    """Raises UserError unless the fields describe a network."""
    levels, factors = tuple(self.levels), tuple(self.factors)
    if len(levels) != len(factors) or not levels:
      raise UserError(
        f'levels = {levels} and factors = {factors} should both have one entry '
        'for each sub-network'
      )
    if levels[0] != 1 or list(levels) != sorted(levels):
      raise UserError(
        f'levels = {levels} should ascend from 1, the coarsest: blocks with '
        'exits never shrink a map'
      )
    if 1 in levels[1:]:
      raise UserError(
        f'levels = {levels}: only the first sub-network may be at level 1; '
        "another there would shrink its maps below the coarsest (the authors' "
        'code fails on it)'
      )
    for factor in factors[1:]:
      added = self.growth * factor
      if not 1 <= int(added * self.compression) < added:
        raise UserError(
          f'growth = {self.growth} x factor {factor} is {added} '
          f'channels a layer, of which compression = {self.compression} leaves '
          'no whole one to the coarser or to the finer map; a layer needs at '
          'least 1 / compression'
        )

  def block_plan(self, scale: int, index: int) -> BlockPlan:
    """Of a block, by the rules of the authors' code."""
    level, blocks = self.levels[scale - 1], self.num_blocks(scale)
    before = [self.num_blocks(s) for s in range(scale)]
    fused = index <= before[-1]
    downs = before[-(level - 1) :] if level > 1 else []
    return BlockPlan(
      scale=scale,
      index=index,
      layers=self.layers * (index if self.lengthen else 1),
      fused=fused,
      down=fused and index in downs,
      transition=index in [i * blocks // level for i in range(1, level)],
    )

  def stage_plan(self, exit_number: int) -> list[BlockPlan]:
    """The blocks that run between the exit before and this one."""
    scale = next(
      s
      for s in range(1, len(self.levels) + 1)
      if exit_number <= self.num_blocks(s)
    )
    starts = exit_number == self.num_blocks(scale - 1) + 1
    first = 1 if starts else exit_number
    return [self.block_plan(scale, j) for j in range(first, exit_number + 1)]

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    logits, state = [], x
    for exit_number in range(1, self.num_exits + 1):
      found, state = self.stage(exit_number, state, train=train)
      logits.append(found)
    return jnp.stack(logits, axis=1)

  @nn.compact
  def stage(
    self, exit_number: int, state: jax.Array | State, *, train: bool
  ) -> tuple[jax.Array, State]:
    """Goes on from one exit to the next.

    Args:
      exit_number: to reach, from 1.
      state: after the exit before; for the first, images [B, H, W, 3].
      train: norms use, and move, the batch's statistics.

    Returns:
      Logits float32 [B, K] of the exit, and the state after it.
    """
    if exit_number == 1:
      widths = tuple(self.width * factor for factor in self.factors)
      stem = Stem(
        self.stem, widths, tuple(self.levels), self.dtype, name='stem'
      )
      state = State(stem(state, train=train), (), None)
    bases, taps, x = state.bases, state.taps, state.x
    coarser = ()
    for plan in self.stage_plan(exit_number):
      if plan.index == 1:
        x, *bases = bases
        coarser, taps = taps, ()
      low = coarser[plan.index - 1] if plan.fused else None
      x, found = Block(
        plan=plan,
        growth=self.growth * self.factors[plan.scale - 1],
        factor=self.factors[plan.scale - 1],
        coarser_factor=self.factors[max(plan.scale - 2, 0)],
        reduction=self.reduction,
        compression=self.compression,
        dtype=self.dtype,
        name=f'scale{plan.scale}_block{plan.index}',
      )(x, low, train=train)
      taps = (*taps, found)
    logits = Exit(
      self.num_classes,
      width=128 if self.stem == 'cifar' else x.shape[-1],
      dtype=self.dtype,
      name=f'exit{exit_number}',
    )(x, train=train)
    is_last_scale = plan.scale == len(self.levels)
    ends = plan.index == self.num_blocks(plan.scale)
    return logits, State(
      bases=tuple(bases),
      taps=() if is_last_scale else taps,
      x=None if ends else x,
    )


def initial(key: jax.Array, variables: dict[str, Any]) -> dict[str, Any]:
  """Fresh variables of a network.

  Convolutions of blocks and exits are normal with variance 2 / (k^2 outputs);
  the stem and the dense layers, which the authors leave to PyTorch, uniform
  within 1 / sqrt(inputs). All weights come from one draw, cut up on the host:
  XLA takes minutes to compile hundreds of initialisers.

  Args:
    key: for the weights.
    variables: shapes, from `network.init`.
  """
  flat = traverse_util.flatten_dict(variables)
  uniform = jax.random.uniform(
    key, (sum(x.size for x in flat.values()),), minval=-1.0
  )
  # Not of -1 itself, which is one draw in 2^23: its erf_inv is infinite.
  normal = np.sqrt(2) * jax.lax.erf_inv(jnp.maximum(uniform, -1 + 2.0**-24))
  if not isinstance(uniform, jax.core.Tracer):
    uniform, normal = np.asarray(uniform), np.asarray(normal)
  values, start = {}, 0
  for path, x in flat.items():
    part, start = slice(start, start + x.size), start + x.size
    # Of a convolution or a dense layer, not of a norm.
    is_weight = path[0] == 'params' and not path[-2].endswith('norm')
    kernel = flat[*path[:-1], 'kernel'].shape if is_weight else ()
    if path[-1] in ('scale', 'var'):
      values[path] = np.ones(x.shape, x.dtype)
    elif not kernel or path[-2:] == ('head', 'bias'):
      values[path] = np.zeros(x.shape, x.dtype)
    elif 'stem' in path or 'head' in path:
      bound = 1 / np.sqrt(np.prod(kernel[:-1]))
      values[path] = np.float32(bound) * uniform[part].reshape(x.shape)
    else:
      spread = np.sqrt(2 / (kernel[0] * kernel[1] * kernel[-1]))
      values[path] = np.float32(spread) * normal[part].reshape(x.shape)
  return traverse_util.unflatten_dict(values)
