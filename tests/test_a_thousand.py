# SPDX-License-Identifier: Apache-2.0
"""A policy run for real is its score on the record: of a thousand images.

Each family of both methods and of a ladder of both, in bulk, one by one, as a
stream and, where they can be exported, by the exported folder and its run.py.
The quicker tests of the same see fewer images at each door.
"""

import numpy as np
import pytest
from conftest import pictures, recorded, tiny_exits, tiny_trained
from PIL import Image
from test_classifier import agrees, points_of

from drnet_jax.choosing import record
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.export.standalone import Model
from drnet_jax.serve.classifier import Classifier

pytestmark = [pytest.mark.slow, pytest.mark.soak]
COUNT = 1000


@pytest.fixture(scope='module')
def images():
  return pictures(COUNT, seed=3)


def calibrated(record_of):
  """A record, and a calibration on it; later options are more often right."""
  said, rng = record_of(None), np.random.default_rng(0)
  options = len(said.options)
  kept = rng.random((COUNT, options)) < np.linspace(0.5, 0.9, options)
  named = said.predicted[np.arange(COUNT), kept.argmax(1)]
  made = record_of(np.where(kept.any(1), named, rng.integers(0, 5, COUNT)))
  return made, Calibration.of(made, split='a test')


def by_every_door(classifier, images, calibration, made):
  """Bulk equals the record; alone and streamed, equal bulk."""
  for family in calibration.points['GMACs']:
    for chosen in points_of(calibration, family):
      classifier.policy = chosen
      answers = classifier.predict(images)
      agrees(answers, chosen, made)
      ran = [x.ran for x in answers]
      alone = [classifier.predict([image])[0].ran for image in images]
      assert sum(a != b for a, b in zip(alone, ran, strict=True)) <= 1
      with classifier.stream(deadline_ms=1e5, batch=4) as stream:
        futures = [stream.submit(image) for image in images]
      streamed = [future.result().ran for future in futures]
      assert sum(a != b for a, b in zip(streamed, ran, strict=True)) <= 1
      assert stream.hurried == stream.late == 0


def by_export(classifier, images, calibration, made, folder):
  """The folder in onnxruntime, and run.py without JAX."""
  exported = Classifier(
    classifier.contract, classifier.engine, calibration, classifier.members
  )
  exported.export(folder, formats=('onnx',))
  theirs = Classifier.load(folder, runtime='onnx')
  for family, points in calibration.points['GMACs'].items():
    for point in (points[0], points[len(points) // 2], points[-1]):
      theirs.policy = point.policy
      answers = theirs.predict(images)
      agrees(answers, point.policy, made)
      model = Model(folder, policy=family, gmacs=point.gmacs)
      ran = [tuple(model.predict(Image.fromarray(x))['ran']) for x in images]
      others = sum(a != x.ran for a, x in zip(ran, answers, strict=True))
      assert others <= 1


def test_sizes(images, tmp_path):
  trained = tiny_trained()
  made, calibration = calibrated(lambda x: recorded(trained, images, x))
  classifier = Classifier.of(trained, runtime='jax', batch=4)
  by_every_door(classifier, images, calibration, made)
  by_export(classifier, images, calibration, made, str(tmp_path / 'out'))


def test_exits():
  images = pictures(COUNT, side=16, seed=3)
  trained = tiny_exits()
  made, calibration = calibrated(lambda x: recorded(trained, images, x))
  by_every_door(Classifier.of(trained, batch=8), images, calibration, made)


def test_a_ladder(images, tmp_path):
  members = {
    'small': tiny_trained(has_router=False, resolutions=(16, 32), spread=2.0),
    'large': tiny_trained(),
  }

  def joined(labels):
    labels = np.zeros(COUNT, int) if labels is None else labels
    return record.join(
      {k: recorded(t, images, labels) for k, t in members.items()}
    )

  made, calibration = calibrated(joined)
  classifier = Classifier.of_ladder(members, runtime='jax', batch=4)
  by_every_door(classifier, images, calibration, made)
  by_export(classifier, images, calibration, made, str(tmp_path / 'out'))
