# SPDX-License-Identifier: Apache-2.0
"""A new classifier for trained features."""

import itertools

import jax
import numpy as np
import pytest
from conftest import pictures, tiny_trained

from drnet_jax import mesh as mesh_lib
from drnet_jax.run import head

IMAGES, BATCH = 96, 32


def batches(mesh, labels):
  """Of training, on the devices; brighter pictures are of a later class."""
  images = pictures(IMAGES)
  brightness = images.mean((1, 2, 3))
  classes = np.digitize(
    brightness, np.quantile(brightness, [0.2, 0.4, 0.6, 0.8])
  )
  for start in range(0, IMAGES, BATCH):
    some = slice(start, start + BATCH)
    batch = {'image': images[some], 'label': labels(classes[some])}
    yield mesh_lib.shard_batch(batch, mesh)


def in_int32(classes):
  return classes.astype(np.int32)


def one_hot(classes):
  return np.eye(5, dtype=np.float32)[classes]


@pytest.mark.parametrize('devices, labels', [(1, in_int32), (8, one_hot)])
def test_it_is_the_logistic_regression_of_scikit_learn(devices, labels):
  from sklearn.linear_model import LogisticRegression  # takes seconds

  trained, mesh = tiny_trained(), mesh_lib.create(devices)
  weights = trained.params, trained.batch_stats
  found = head.fitted(trained.model, *weights, batches(mesh, labels), mesh)

  parts = [
    head._features(trained.model, *weights, b)
    for b in batches(mesh_lib.create(1), in_int32)
  ]
  x, y = (np.concatenate(p) for p in zip(*parts, strict=True))
  scale = np.sqrt((x**2).mean())
  c = 1 / (head._WEIGHT_DECAY * IMAGES)
  theirs = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(x / scale, y)
  ours = jax.device_get(found['base']['head'])
  logits = x @ ours['kernel'] + ours['bias']
  wanted = theirs.decision_function(x / scale)
  np.testing.assert_allclose(
    logits - logits.mean(1, keepdims=True),
    wanted - wanted.mean(1, keepdims=True),
    atol=0.05,
  )
  assert (logits.argmax(1) == y).mean() > 0.6  # by chance .2

  # Nothing else has moved.
  for group, tree in trained.params.items():
    for name, leaves in tree.items():
      if (group, name) != ('base', 'head'):
        assert found[group][name] is leaves


def test_images_without_a_label_change_nothing(capsys):
  trained, mesh = tiny_trained(), mesh_lib.create(1)
  weights = trained.params, trained.batch_stats

  def doubled():
    """Every picture once more, without its label."""
    for batch in batches(mesh, one_hot):
      yield batch
      yield batch | {'label': 0 * batch['label']}

  found = [
    head.fitted(trained.model, *weights, some, mesh)['base']['head']['kernel']
    for some in (batches(mesh, one_hot), doubled())
  ]
  np.testing.assert_allclose(*found, atol=0.05 * np.abs(found[0]).max())
  alone, with_others = capsys.readouterr().out.splitlines()
  assert alone == with_others and f'of {IMAGES} crops' in alone


@pytest.mark.parametrize(
  'layer',
  [lambda dense: {'kernel': dense['kernel']}, lambda dense: {'a': dense}],
)
def test_a_classifier_of_another_kind_is_left_as_it_is(layer, capsys):
  trained, mesh = tiny_trained(), mesh_lib.create(1)
  base = trained.params['base']
  base = base | {'head': layer(base['head'])}
  params = trained.params | {'base': base}
  none = iter(())
  found = head.fitted(trained.model, params, trained.batch_stats, none, mesh)
  assert found is params and 'is random' in capsys.readouterr().out


def test_it_reads_no_more_images_than_it_needs(monkeypatch):
  monkeypatch.setattr(head, '_ENOUGH_IMAGES', 2 * BATCH)
  trained, mesh = tiny_trained(), mesh_lib.create(1)
  source = batches(mesh, in_int32)
  head.fitted(trained.model, trained.params, trained.batch_stats, source, mesh)
  assert len(list(itertools.islice(source, 9))) == IMAGES // BATCH - 2
