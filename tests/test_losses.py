# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drnet_jax import losses

GMACS = jnp.array([1.0, 2.0, 4.0])


@pytest.mark.parametrize(
  'target, expected',
  [
    (1.0, 4 / 9),  # mean of 1, 2, 4 is 7/3; (7/3 - 1) / (4 - 1)
    (2.0, 1 / 9),
    (2.5, 0.0),
  ],
)
def test_hinge(target, expected):
  value = losses.flops_hinge(jnp.eye(3), GMACS, target_gmacs=target)
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_hinge_pulls_every_entry_by_its_cost():
  grad = jax.grad(lambda h: losses.flops_hinge(h, GMACS, target_gmacs=1.0))(
    jnp.eye(3)
  )
  # d/dh_bj = C_j / (B (C_max - C_min)), chosen or not
  np.testing.assert_allclose(grad, np.tile(GMACS / 9, (3, 1)), rtol=1e-6)


def test_no_pull_under_the_target():
  grad = jax.grad(lambda h: losses.flops_hinge(h, GMACS, target_gmacs=3.0))(
    jnp.eye(3)
  )
  assert not grad.any()


def test_smoothed_cross_entropy_is_optax_on_smoothed_labels():
  logits = jax.random.normal(jax.random.key(0), (4, 5))
  labels = jnp.array([0, 3, 4, 1])
  smooth = optax.smooth_labels(jax.nn.one_hot(labels, 5), 0.1)
  np.testing.assert_allclose(
    losses.cross_entropy(logits, labels, label_smoothing=0.1),
    optax.softmax_cross_entropy(logits, smooth),
    rtol=1e-5,
  )


def test_without_a_label_there_is_no_loss_and_the_teacher_is_all():
  logits = jax.random.normal(jax.random.key(0), (2, 5))
  labels = jnp.array([[0.0, 0.25, 0.75, 0.0, 0.0], [0.0] * 5])
  loss = losses.cross_entropy(logits, labels, label_smoothing=0.1)
  assert loss[0] > 0 and loss[1] == 0
  assert losses.has_label(labels).tolist() == [True, False]
  assert not losses.right(logits, labels)[1]
  targets = losses.blended(labels, logits, share=0.4)
  teacher = jax.nn.softmax(logits)
  np.testing.assert_allclose(
    targets, [0.6 * labels[0] + 0.4 * teacher[0], teacher[1]], rtol=1e-5
  )


def test_an_ensemble_weighs_who_answers_well():
  labels = jax.random.randint(jax.random.key(0), (200,), 0, 5)
  noise = jax.random.normal(jax.random.key(1), (3, 200, 5))
  skill = jnp.array([0.5, 1.0, 3.0])[:, None, None]
  logits = noise + skill * jax.nn.one_hot(labels, 5)

  def loss(x):
    return losses.cross_entropy(x, labels, label_smoothing=0.0).mean()

  found = losses.ensemble(logits, labels)
  assert loss(found) < loss(logits.mean(0)) - 0.05
  assert loss(found) < min(map(loss, logits)) + 0.05
  # Who say the same weigh the same; labels may be distributions.
  same = jnp.stack([logits[0]] * 2)
  blended = 0.5 * jax.nn.one_hot(labels, 5) + 0.1
  np.testing.assert_allclose(
    losses.ensemble(same, blended), logits[0], rtol=1e-5
  )
  assert not jax.grad(lambda x: losses.ensemble(x, labels).sum())(logits).any()


def test_uniform_usage():
  # shares 3/4, 1/4, 0 against 1/3: (5/12)^2 + (1/12)^2 + (4/12)^2 = 42/144
  choice = jax.nn.one_hot(jnp.array([0, 0, 0, 1]), 3)
  np.testing.assert_allclose(losses.uniform_usage(choice), 42 / 144, rtol=1e-6)


def test_a_distribution_of_labels_weighs_their_losses():
  logits = jnp.array([[2.0, 0.0, -1.0]])
  each = [
    losses.cross_entropy(logits, jnp.array([k]), label_smoothing=0.1)
    for k in range(3)
  ]
  mixed = losses.cross_entropy(
    logits, jnp.array([[0.75, 0.0, 0.25]]), label_smoothing=0.1
  )
  np.testing.assert_allclose(mixed, 0.75 * each[0] + 0.25 * each[2], rtol=1e-6)
  assert losses.right(logits, jnp.array([[0.75, 0.0, 0.25]]))
  assert not losses.right(logits, jnp.array([1]))
