# SPDX-License-Identifier: Apache-2.0
"""Resolution-aware batch norm for any Linen network, without touching it.

DRNet (arXiv:2106.02898), Eq. 3: every batch norm has a private scale, bias,
mean and variance for each candidate size, all else is shared. A module that
owns `batch_stats` is a norm; `split` takes its parameters off by path, one
*set* of them is kept per size, and `merge` puts a set back to make an ordinary
variable tree. `masked_norms` keeps padding out of the statistics.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from drnet_jax.errors import UserError
from drnet_jax.models import layers

Tree = dict[str, Any]


def split(params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
  """Splits a network's parameters into (shared, norm).

  Args:
    params: the 'params' collection of a Linen network.
    batch_stats: its 'batch_stats' collection; every module with an entry here
      is a norm.

  Returns:
    Two trees that `merge` joins again.
  """
  norms = {path[:-1] for path in traverse_util.flatten_dict(batch_stats)}
  flat = traverse_util.flatten_dict(params)
  norm = {path: x for path, x in flat.items() if path[:-1] in norms}
  shared = {path: x for path, x in flat.items() if path not in norm}
  unflatten = traverse_util.unflatten_dict
  return unflatten(shared), unflatten(norm)


def merge(shared: Tree, norm: Tree) -> Tree:
  """The 'params' collection with this set of norms; inverse of `split`."""
  return traverse_util.unflatten_dict(
    traverse_util.flatten_dict(shared) | traverse_util.flatten_dict(norm)
  )


@contextlib.contextmanager
def masked_norms(mask: jax.Array | None) -> Iterator[None]:
  """Within it, every nn.BatchNorm counts only the images under the mask.

  Args:
    mask: bool [B], False for images that are padding; None counts all.
  """
  if mask is None:
    yield
    return

  def add_mask(call, args, kwargs, context):
    is_norm = isinstance(context.module, nn.BatchNorm)
    if is_norm and context.method_name == '__call__':
      shape = [-1] + [1] * (args[0].ndim - 1)
      kwargs = kwargs | {'mask': mask.reshape(shape)}
    return call(*args, **kwargs)

  with nn.intercept_methods(add_mask):
    yield


def weighed(old: Tree, new: Tree, takers: jax.Array, even_share: float) -> Tree:
  """Running statistics that count images rather than batches.

  A norm's momentum is meant for a batch. A size that an even share of the batch
  chose (B / R images) or more moves its running statistics as much as that
  says; one of fewer takers in proportion, so that each of its images weighs the
  same, and a single one does not weigh as much as all others together.

  Args:
    old: before the step.
    new: as the momentum has it.
    takers: images of the whole batch that chose the size.
    even_share: B / R.
  """
  share = takers / even_share
  return jax.tree.map(
    lambda a, b: jnp.where(takers < even_share, a + share * (b - a), b),
    old,
    new,
  )


def check_norms(network: nn.Module, images: jax.ShapeDtypeStruct) -> None:
  """Checks that a network can run, and with norms whose padding is masked.

  Args:
    network: called as `network(images, train=...)`.
    images: [B, H, W, 3].

  Raises:
    UserError: it has batch statistics that cannot be masked.
    ValueError: a layer is empty. (Not all versions of JAX fail on one.)
  """
  maskable = set()

  def note(call, args, kwargs, context):
    if isinstance(context.module, nn.BatchNorm):
      maskable.add(context.module.path)
    return call(*args, **kwargs)

  with nn.intercept_methods(note), layers.shapes_alone():
    variables = jax.eval_shape(
      lambda x: network.init(jax.random.key(0), x, train=False), images
    )
  for path, x in traverse_util.flatten_dict(variables).items():
    if not x.size:
      raise ValueError(f'{"/".join(path[1:])} is empty, of shape {x.shape}')
  stats = traverse_util.flatten_dict(variables.get('batch_stats', {}))
  stray = {path[:-1] for path in stats} - maskable
  if stray:
    names = ', '.join(sorted('/'.join(path) for path in stray))
    raise UserError(
      f'{type(network).__name__} keeps batch statistics in {names}, which is '
      'no flax.linen.BatchNorm: padding images would count in them. Build the '
      'norm on flax.linen.BatchNorm.'
    )
