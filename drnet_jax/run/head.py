# SPDX-License-Identifier: Apache-2.0
"""A new classifier for trained features, fitted before they are trained on.

Under a random classifier good features are spoilt before it has learned
anything (Kumar et al., ICLR 2022, arXiv:2202.10054). So it is fitted to them as
they are, by multinomial logistic regression.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from drnet_jax import losses, processes, terminal
from drnet_jax import mesh as mesh_lib
from drnet_jax.models.drnet import DRNet
from drnet_jax.models.layers import HEAD

_ENOUGH_IMAGES = 4096
_WEIGHT_DECAY = 1e-3  # for features of mean square 1
_MOST_ITERATIONS = 100
_FLAT = 1e-4  # norm of the gradient


def fitted(
  model: DRNet,
  params: Mapping[str, Any],
  batch_stats: Mapping[str, Any],
  batches: Iterable[Mapping[str, jax.Array]],
  mesh: Mesh,
) -> Mapping[str, Any]:
  """Params with a classifier that is fitted to the largest size's features.

  A classifier that is not a dense layer with a bias is left as it is.

  Args:
    model: whose base network ends with the layer HEAD.
    params, batch_stats: of the model.
    batches: of training, on the devices of the mesh.
  """
  layer, size_px = params['base'][HEAD], max(model.resolutions)
  if jax.tree.map(jnp.ndim, layer) != {'kernel': 2, 'bias': 1}:
    terminal.say(
      f'{HEAD!r} is not a dense layer with a bias: the new classifier is random'
    )
    return params
  whole = mesh_lib.replicated(mesh)
  batches = iter(batches)
  first = next(batches)
  read = jax.jit(
    functools.partial(_features, model), out_shardings=(whole, whole)
  )
  read = read.lower(params, batch_stats, first).compile()
  processes.wait_for_all('features')
  parts = []
  with terminal.progress(desc='features', unit='img', leave=False) as bar:
    for batch in itertools.chain([first], batches):
      parts.append(read(params, batch_stats, batch))
      bar.update(len(batch['image']))
      if len(parts) * len(batch['image']) >= _ENOUGH_IMAGES:
        break
  fit = jax.jit(_fit, out_shardings=whole)
  with jax.default_matmul_precision('highest'):  # a line search compares losses
    layer, count, right = fit(layer, *zip(*parts, strict=True))
  terminal.say(
    f'A new classifier, fitted to the features of {count:.0f} crops at '
    f'{size_px} px: {right:.1%} of them right'
  )
  return {**params, 'base': {**params['base'], HEAD: layer}}


def _features(model: DRNet, params, batch_stats, batch):
  """What the classifier reads, float32 [B, F], and the labels."""
  found = []

  def keep(call, arguments, options, context):
    if context.module.path == (HEAD,):
      found.append(arguments[0])
    return call(*arguments, **options)

  with nn.intercept_methods(keep):
    model.logits_at(params, batch_stats, batch['image'], max(model.resolutions))
  return found[0].astype(jnp.float32), batch['label']


def _fit(layer, features, labels):
  """The layer's parameters, how many images have a label, and share right."""
  x, labels = jnp.concatenate(features), jnp.concatenate(labels)
  known = losses.has_label(labels)
  count = jnp.maximum(known.sum(), 1)
  scale = jnp.sqrt(jnp.mean(x**2))
  x /= scale

  def loss(layer):
    logits = x @ layer['kernel'] + layer['bias']
    decay = _WEIGHT_DECAY / 2 * jnp.sum(layer['kernel'] ** 2)
    each = losses.cross_entropy(logits, labels, label_smoothing=0.0)
    return each.sum() / count + decay

  optimizer = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(carry):
    i, layer, state, _ = carry
    value, grad = value_and_grad(layer, state=state)
    updates, state = optimizer.update(
      grad, state, layer, value=value, grad=grad, value_fn=loss
    )
    norm = optax.tree.norm(grad)
    return i + 1, optax.apply_updates(layer, updates), state, norm

  def goes_on(carry):
    i, *_, norm = carry
    return (i < _MOST_ITERATIONS) & (norm > _FLAT)

  layer = jax.tree.map(jnp.zeros_like, layer)
  begin = 0, layer, optimizer.init(layer), jnp.inf
  _, layer, *_ = jax.lax.while_loop(goes_on, step, begin)
  right = losses.right(x @ layer['kernel'] + layer['bias'], labels)
  layer = layer | {'kernel': layer['kernel'] / scale}
  return layer, count, right.sum() / count
