# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drnet_jax import routing

LOGITS = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))


def test_choice_is_exactly_one_hot():
  logits = jax.random.normal(jax.random.key(0), (1000, 3)) * 5
  h = routing.straight_through(jax.random.key(1), logits, tau=0.3)
  assert set(np.unique(h)) == {0.0, 1.0}
  assert (h.sum(1) == 1).all()


@pytest.mark.parametrize('tau', [0.5, 1.0, 5.0])
def test_gradient_is_the_soft_choices(tau):
  key, weights = jax.random.key(3), jnp.array([1.0, -2.0, 0.5])

  def soft(logits):
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return (jax.nn.softmax((logits + noise) / tau) @ weights).sum()

  def hard(logits):
    return (routing.straight_through(key, logits, tau=tau) @ weights).sum()

  np.testing.assert_allclose(
    jax.grad(hard)(LOGITS), jax.grad(soft)(LOGITS), rtol=1e-6
  )


def test_draws_have_the_predicted_probabilities():
  count = 40_000
  h = routing.straight_through(
    jax.random.key(0), jnp.tile(LOGITS, (count, 1)), tau=1.0
  )
  # five standard deviations
  np.testing.assert_allclose(
    h.mean(0), [0.7, 0.2, 0.1], atol=5 * np.sqrt(0.25 / count)
  )


def test_inference_has_no_noise():
  assert routing.choose(
    jnp.array([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
  ).tolist() == [1, 0]


@pytest.mark.parametrize('largest', [1, 2, 10, 64, 128, 1000])
@pytest.mark.parametrize('growth', [1.125, 1.3, 2.0])
def test_every_count_has_a_bucket(largest, growth):
  ladder = routing.bucket_ladder(largest, growth=growth, platform='cpu')
  assert list(ladder) == sorted(set(ladder)) and ladder[-1] == largest
  for count in range(1, largest + 1):
    held = routing.bucket(count, ladder)
    assert held >= count
    if count >= ladder[0]:
      # one step of the ladder, and rounding up to a multiple of 4
      assert held <= count * growth + 4


def test_small_batches_have_buckets_too():
  def ladder(largest, platform):
    return routing.bucket_ladder(largest, growth=1.125, platform=platform)

  assert ladder(32, 'cpu') == (4, 8, 12, 16, 20, 24, 28, 32)
  assert ladder(3, 'cpu') == ladder(3, 'tpu') == (3,)
  # Where a smaller bucket saves no time there is none.
  assert ladder(32, 'gpu') == (16, 20, 24, 28, 32)
  assert ladder(32, 'tpu') == (16, 24, 32)
  # Programs of a routed step of three sizes at 256 images a device: two more.
  assert [3 * len(ladder(256, p)) for p in ('cpu', 'tpu')] == [63, 57]


def test_slots_point_at_the_takers_and_nothing_else_counts():
  choice = jnp.array([2, 0, 2, 1, 2, 0])
  index, mask = routing.slots(choice, 2, 5)
  assert index[:3].tolist() == [0, 2, 4]
  assert mask.tolist() == [True, True, True, False, False]
  _, nobody = routing.slots(choice, 3, 4)
  assert not nobody.any()
