# SPDX-License-Identifier: Apache-2.0
"""A new classifier for trained features, fitted before they are trained on.

Under a random classifier good features are spoilt before it has learned
anything (Kumar et al., ICLR 2022, arXiv:2202.10054). So it is fitted to them as
they are: multinomial logistic regression, which takes seconds.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from drnet_jax import losses, terminal
from drnet_jax import mesh as mesh_lib
from drnet_jax.models.drnet import DRNet
from drnet_jax.models.layers import HEAD

_MOST_IMAGES = 4096
_WEIGHT_DECAY = 1e-3  # for features of mean square 1
_ITERATIONS = 100


def fitted(
  model: DRNet,
  params: Mapping[str, Any],
  batch_stats: Mapping[str, Any],
  batches: Iterable[Mapping[str, jax.Array]],
  mesh: Mesh,
) -> dict[str, Any]:
  """Params with a classifier that is fitted to the largest size's features.

  Args:
    model: whose base network ends with a dense layer HEAD.
    params, batch_stats: of the model.
    batches: of training, on the devices: 'image' and 'label'.
    mesh: devices to run on.
  """
  whole = mesh_lib.replicated(mesh)
  read = jax.jit(_features, static_argnums=0, out_shardings=(whole, whole))
  parts, count = [], 0
  for batch in batches:
    parts.append(read(model, params, batch_stats, batch))
    count += len(batch['image'])
    if count >= _MOST_IMAGES:
      break
  features, labels = zip(*parts, strict=True)
  fit = jax.jit(_fit, out_shardings=whole)
  head, right = fit(params['base'][HEAD], features, labels)
  terminal.say(
    f'A new classifier, fitted to the features of {count} crops at '
    f'{max(model.resolutions)} px: {right:.1%} of them right'
  )
  return {**params, 'base': {**params['base'], HEAD: head}}


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


def _fit(head, features, labels):
  """The layer's parameters, and the share of the images that it gets right."""
  x, labels = jnp.concatenate(features), jnp.concatenate(labels)
  scale = jnp.sqrt(jnp.mean(x**2))
  x /= scale

  def loss(layer):
    logits = x @ layer['kernel'] + layer['bias']
    decay = _WEIGHT_DECAY / 2 * jnp.sum(layer['kernel'] ** 2)
    wrong = losses.cross_entropy(logits, labels, label_smoothing=0.0)
    return wrong.mean() + decay

  optimizer = optax.lbfgs()

  def step(carry, _):
    layer, state = carry
    value, grad = optax.value_and_grad_from_state(loss)(layer, state=state)
    updates, state = optimizer.update(
      grad, state, layer, value=value, grad=grad, value_fn=loss
    )
    return (optax.apply_updates(layer, updates), state), value

  layer = jax.tree.map(jnp.zeros_like, head)
  begin = layer, optimizer.init(layer)
  (layer, _), _ = jax.lax.scan(step, begin, None, _ITERATIONS)
  right = losses.right(x @ layer['kernel'] + layer['bias'], labels).mean()
  return layer | {'kernel': layer['kernel'] / scale}, right
