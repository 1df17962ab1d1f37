# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drnet_jax.errors import UserError
from drnet_jax.steps import optim

PARAMS = {
  'base': {
    'kernel': jnp.ones((2, 2)),
    'bias': jnp.ones(2),
    'head': {'kernel': jnp.ones((2, 2))},
  },
  'predictor': {'kernel': jnp.ones((2, 2))},
}


def make(**changes):
  values = {
    'name': 'sgd',
    'momentum': 0.9,
    'weight_decay': 0.1,
    'decay_norms_and_biases': True,
    'clip_norm': 0.0,
    'predictor_lr': 0.1,
    'head_lr': 1.0,
    'lr': optax.constant_schedule(0.5),
    'trains': ('base', 'predictor'),
    'accumulate': 1,
  }
  return optim.create(**values | changes)


def one_update(**changes):
  optimizer = make(**changes)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]


def test_rates_and_decay():
  updates = one_update()
  # -(0.5) (1 + 0.1 * 1), and a tenth of it for the predictor
  np.testing.assert_allclose(updates['base']['kernel'], -0.55, rtol=1e-6)
  np.testing.assert_allclose(updates['base']['bias'], -0.55, rtol=1e-6)
  np.testing.assert_allclose(updates['predictor']['kernel'], -0.055, rtol=1e-6)


def test_a_classifier_can_have_a_rate_of_its_own():
  updates = one_update(head_lr=10.0)
  np.testing.assert_allclose(updates['base']['kernel'], -0.55, rtol=1e-6)
  head = updates['base']['head']['kernel']
  np.testing.assert_allclose(head, -5.5, rtol=1e-6)
  # Without one, the optimiser's state has the form that it always had.
  states = [make(head_lr=x).init(PARAMS).inner_states for x in (1.0, 10.0)]
  assert [len(state) for state in states] == [3, 4]
  frozen = one_update(head_lr=10.0, trains=('predictor',))
  assert not frozen['base']['head']['kernel'].any()


def test_biases_can_be_spared_decay():
  updates = one_update(decay_norms_and_biases=False)
  np.testing.assert_allclose(updates['base']['kernel'], -0.55, rtol=1e-6)
  np.testing.assert_allclose(updates['base']['bias'], -0.5, rtol=1e-6)


def test_what_is_not_trained_does_not_move():
  updates = one_update(trains=('base',))
  assert not updates['predictor']['kernel'].any()


def test_paper_schedule():
  rate = optim.schedule(
    kind='step',
    lr=0.1,
    warmup_epochs=3,
    epochs=70,
    decay_epochs=20,
    decay_factor=0.1,
    steps_per_epoch=10,
  )
  expected = {0: 0, 15: 0.05, 30: 0.1, 199: 0.1, 201: 0.01, 401: 1e-3}
  for step, value in expected.items():
    np.testing.assert_allclose(rate(step), value, rtol=1e-5, atol=1e-9)


def test_halfway_schedule():
  """RANet's on CIFAR: x.1 from epoch 150 and again from 225 of 300."""
  rate = optim.schedule(
    kind='halfway',
    lr=0.1,
    warmup_epochs=0,
    epochs=300,
    decay_epochs=0,
    decay_factor=0.1,
    steps_per_epoch=10,
  )
  expected = {0: 0.1, 1499: 0.1, 1501: 0.01, 2249: 0.01, 2251: 1e-3}
  for step, value in expected.items():
    np.testing.assert_allclose(rate(step), value, rtol=1e-5)


def test_unknown_names():
  with pytest.raises(UserError, match="optimiser 'sdg'"):
    make(name='sdg')


def test_accumulating_is_one_update_of_the_mean():
  optimizer = make(accumulate=2)
  state = optimizer.init(PARAMS)
  gradients = [jax.tree.map(lambda x, s=s: s * x, PARAMS) for s in (1.0, 5.0)]
  first, state = optimizer.update(gradients[0], state, PARAMS)
  assert not any(jnp.any(x) for x in jax.tree.leaves(first))
  second, _ = optimizer.update(gradients[1], state, PARAMS)
  at_once = make()
  mean = jax.tree.map(lambda x: 3.0 * x, PARAMS)
  expected, _ = at_once.update(mean, at_once.init(PARAMS), PARAMS)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), second, expected
  )
