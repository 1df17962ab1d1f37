# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from drnet_jax import settings
from drnet_jax.errors import UserError
from drnet_jax.run.stage import Stage
from drnet_jax.steps import optim
from drnet_jax.steps import state as state_lib

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


def test_a_schedule_without_decay():
  rate = optim.schedule(
    kind='step',
    lr=0.1,
    warmup_epochs=0,
    epochs=70,
    decay_epochs=0,
    decay_factor=0.1,
    steps_per_epoch=10,
  )
  assert rate(0) == rate(699) == pytest.approx(0.1)


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


@pytest.mark.parametrize('epochs', [1, 2, 3, 5])
def test_halfway_is_halfway_of_any_number_of_epochs(epochs):
  rate = optim.schedule(
    kind='halfway',
    lr=1.0,
    warmup_epochs=0,
    epochs=epochs,
    decay_epochs=0,
    decay_factor=0.1,
    steps_per_epoch=40,
  )
  steps = 40 * epochs
  for share, expected in ((0.45, 1), (0.55, 0.1), (0.7, 0.1), (0.8, 0.01)):
    assert rate(round(share * steps)) == pytest.approx(expected)


def test_unknown_names():
  section = quickstart.get_config().finetune
  section.optimizer.name = 'sdg'
  stage = settings.call(Stage, section, 'config.finetune')
  with pytest.raises(UserError, match="finetune.optimizer.name = 'sdg' is not"):
    stage.check('config.finetune')


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


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', ['sgd', 'nesterov', 'adamw'])
def test_sets_of_norms_without_images_stay(name, accumulate):
  """Those of an update in which one step had images move as they would."""
  optimizer = make(
    name=name, accumulate=accumulate, trains=('base', 'norm', 'predictor')
  )
  norm = {'scale': jnp.ones(2)}
  # 'base' has a module that is called as a group of parameters is.
  params = PARAMS | {
    'base': {'norm': {'a': norm}},
    'norm': {'a': norm, 'b': norm},
  }

  def gradient(a, b):
    grads = jax.tree.map(jnp.ones_like, params)
    for set_name, chosen in (('a', a), ('b', b)):
      grads['norm'][set_name] = {'scale': chosen * jnp.ones(2)}
    return grads

  def update(state, chosen, masks=True):
    for a, b in chosen:
      state = state_lib.advanced(
        state,
        optimizer,
        gradient(a, b),
        {},
        chosen={'a': jnp.asarray(a), 'b': jnp.asarray(b)} if masks else None,
      )
    return state

  def of_set(state, set_name):
    leaves = jax.tree_util.tree_leaves_with_path(
      (state.params, state.opt_state)
    )
    return {
      jax.tree_util.keystr(path): np.asarray(x)
      for path, x in leaves
      if f"['norm']['{set_name}']" in jax.tree_util.keystr(path)
      and "['base']" not in jax.tree_util.keystr(path)
    }

  start = update(
    state_lib.begin(optimizer, params, {}), [(True, True)] * accumulate
  )
  # In the last update only the first step has images of b, if any.
  steps = [(True, accumulate > 1)] + [(True, False)] * (accumulate - 1)
  after = update(start, [(True, False)] * accumulate)
  for key, x in of_set(after, 'b').items():
    np.testing.assert_array_equal(x, of_set(start, 'b')[key], err_msg=key)
  free = update(start, [(True, False)] * accumulate, masks=False)
  assert_same(of_set(after, 'a'), of_set(free, 'a'))
  for group in ('base', 'predictor'):
    assert_same(after.params[group], free.params[group])
  if accumulate > 1:
    assert_same(
      of_set(update(start, steps), 'b'),
      of_set(update(start, steps, masks=False), 'b'),
    )


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_muon_makes_kernels_orthogonal_and_leaves_the_rest_to_adamw():
  keys = iter(jax.random.split(jax.random.key(0), 9))
  shape = {
    'base': {
      'conv': {'kernel': (3, 3, 4, 16), 'bias': (16,)},
      'head': {'kernel': (16, 5)},
    },
    'predictor': {'dense': {'kernel': (24, 6)}},
  }
  params, grads = (
    jax.tree.map(
      lambda s: jax.random.normal(next(keys), s),
      shape,
      is_leaf=lambda x: isinstance(x, tuple),
    )
    for _ in range(2)
  )

  def update(name, **changes):
    plain = {'decay_norms_and_biases': False, 'weight_decay': 0.0}
    optimizer = make(name=name, **plain | changes)
    return optimizer.update(grads, optimizer.init(params), params)[0]

  muon, adamw = update('muon'), update('adamw')
  for kernel, rate in (
    (muon['base']['conv']['kernel'], 0.5),
    (muon['predictor']['dense']['kernel'], 0.05),
  ):
    matrix = kernel.reshape(-1, kernel.shape[-1])
    # All directions are of one length, to Newton and Schulz's accuracy.
    singular = jnp.linalg.svd(matrix, compute_uv=False)
    length = 0.2 * len(matrix) ** 0.5 * rate
    assert (abs(singular / length - 1) < 0.4).all()
  # The first step of Adam goes by the gradient's sign.
  for rest in (('conv', 'bias'), ('head', 'kernel')):
    got, expected = (tree['base'][rest[0]][rest[1]] for tree in (muon, adamw))
    assert (jnp.sign(got) == jnp.sign(expected)).all()
    assert (abs(got) > 0.4).all()
  # Decay: kernels always, the rest as norms and biases.
  spared, all_of_them = (
    jax.tree.map(
      jnp.subtract,
      update('muon', weight_decay=0.1, decay_norms_and_biases=decayed),
      muon,
    )['base']
    for decayed in (False, True)
  )
  for tree in (spared, all_of_them):
    np.testing.assert_allclose(
      tree['conv']['kernel'],
      -0.05 * params['base']['conv']['kernel'],
      atol=1e-5,
    )
  assert not spared['conv']['bias'].any()
  np.testing.assert_allclose(
    all_of_them['head']['kernel'],
    -0.05 * params['base']['head']['kernel'],
    atol=1e-5,
  )
