# SPDX-License-Identifier: Apache-2.0
"""Losses of training.

Cross-entropy, teachers (distillation, the ensemble of RS-Net), the FLOPs hinge
of DRNet (arXiv:2106.02898), the regulariser of AR-Net.
"""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
  logits: jax.Array, labels: jax.Array, *, label_smoothing: float
) -> jax.Array:
  """Softmax cross-entropy per image.

  Args:
    logits: [..., K].
    labels: int, broadcast to [...], or distributions, float, to [..., K];
      zeros where an image has no label: its loss is 0.
    label_smoothing: share of the target spread evenly over the K classes.

  Returns:
    float32 [...].
  """
  logits = logits.astype(jnp.float32)
  if _are_distributions(labels):
    loss = optax.softmax_cross_entropy(logits, labels)
  else:
    labels = jnp.broadcast_to(labels, logits.shape[:-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  if label_smoothing:
    uniform = -jax.nn.log_softmax(logits).mean(-1)
    uniform = jnp.where(has_label(labels), uniform, 0.0)
    loss = (1 - label_smoothing) * loss + label_smoothing * uniform
  return loss


def has_label(labels: jax.Array) -> jax.Array:
  """Which images have a label, bool [...]: all but distributions of zeros."""
  if _are_distributions(labels):
    return labels.any(-1)
  return jnp.ones(labels.shape, bool)


def right(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether the likeliest class is the label, or a distribution's likeliest.

  Logits and labels are those of `cross_entropy`; bool [...], False of images
  without a label.
  """
  if _are_distributions(labels):
    labels = jnp.where(has_label(labels), labels.argmax(-1), -1)
  return logits.argmax(-1) == labels


def blended(
  labels: jax.Array, teacher: jax.Array, *, share: float
) -> jax.Array:
  """Labels mixed with what a teacher makes of the images.

  The cross-entropy against them is that against the labels and that against the
  teacher, in these shares (Hinton et al., arXiv:1503.02531, temperature 1).
  What a label lacks to 1 is the teacher's too: all of an image without one.

  Args:
    labels: int [B] or float [B, K].
    teacher: its logits [B, K]; they get no gradient.
    share: the teacher's, in [0, 1].

  Returns:
    float32 [B, K], distributions.
  """
  teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
  if not _are_distributions(labels):
    labels = jax.nn.one_hot(labels, teacher.shape[-1])
  of_labels = (1 - share) * labels
  rest = 1 - of_labels.sum(-1, keepdims=True)
  return of_labels + rest * jax.nn.softmax(teacher)


def ensemble(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Weighted mean of several answers to the same images, a teacher of each.

  The weights, a softmax of R scalars, are those with which the mean answers
  these images best: ten steps down the gradient of its cross-entropy, from
  equal weights.

  Source: RS-Net (arXiv:2007.09558), Eq. 4 and its code. Departs: there the
  scalars are parameters of the network, which the optimiser moves; here nothing
  has to be kept from one step to the next.

  Args:
    logits: [R, B, K]; they get no gradient.
    labels: see `cross_entropy`.

  Returns:
    float32 [B, K], logits.
  """
  logits = jax.lax.stop_gradient(logits.astype(jnp.float32))

  def mean(scalars):
    return jnp.tensordot(jax.nn.softmax(scalars), logits, 1)

  def loss(scalars):
    return cross_entropy(mean(scalars), labels, label_smoothing=0.0).mean()

  scalars = jnp.zeros(len(logits))
  for _ in range(10):
    scalars -= 4 * jax.grad(loss)(scalars)
  return mean(scalars)


def _are_distributions(labels: jax.Array) -> bool:
  return jnp.issubdtype(labels.dtype, jnp.floating)


def flops_hinge(
  choice: jax.Array, gmacs: jax.Array, *, target_gmacs: float | jax.Array
) -> jax.Array:
  """The FLOPs loss: how far the average cost lies above its target.

  `max(0, (mean_b sum_j C_j h_bj - alpha) / (C_max - C_min))`, Eq. 6 and 7.
  The predictor's own cost is not in C_j, as in the paper.

  Args:
    choice: [B, R], one-hot h (or probabilities) over the whole global batch.
    gmacs: [R], C_j, cost of the base network at each candidate size.
    target_gmacs: alpha.

  Returns:
    A scalar, 0 when the average is at or under the target.
  """
  mean_gmacs = (choice @ gmacs).mean()
  return jax.nn.relu((mean_gmacs - target_gmacs) / (gmacs.max() - gmacs.min()))


def uniform_usage(choice: jax.Array) -> jax.Array:
  """Squared distance of the sizes' shares from equal use (AR-Net, ECCV 2020).

  Of a choice [B, R], one-hot or probabilities; 0 when all are used equally.
  """
  share = choice.mean(0)
  return jnp.square(share - 1 / choice.shape[-1]).sum()
