# SPDX-License-Identifier: Apache-2.0
"""The budget dial: what it chooses, and that a budget is met."""

import dataclasses

import numpy as np
import pytest

from drnet_jax.commands import calibrate
from drnet_jax.errors import UserError
from drnet_jax.report import policies
from drnet_jax.report.policies import Record
from drnet_jax.serve import budget

GMACS = np.array([1.0, 2.0, 4.0])
PREDICTOR = 0.25


def make_record(count, *, seed=0, scale=2.0):
  """Images of which larger sizes get more right, and a router that knows."""
  rng = np.random.default_rng(seed)
  need = rng.uniform(0, 1, count)  # how hard an image is
  right = need[:, None] < np.array([0.5, 0.75, 0.9])
  label = np.zeros(count, int)
  logits = scale * right + rng.normal(0, 1, (count, 3))
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  return Record(
    options=np.array(['16 px', '24 px', '32 px']),
    gmacs=GMACS,
    predictor_gmacs=PREDICTOR,
    label=label,
    predicted=np.where(right, 0, 1),
    confidence=np.where(right, 0.9, 0.4) + rng.uniform(0, 0.05, right.shape),
    top5=np.ones_like(right),
    log_p=log_p,
    extra={},
  )


@pytest.fixture(scope='module')
def calibration():
  return budget.Calibration.of(make_record(2000), split='validation')


def test_choice_by_hand():
  log_p = np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
  assert budget.choose(log_p, 0.0, GMACS).tolist() == [0, 2]
  # log .7 - log .2 = 1.25 for 2 GMACs more: lambda over .63 moves the second.
  assert budget.choose(log_p, 0.62, GMACS).tolist() == [0, 2]
  assert budget.choose(log_p, 0.64, GMACS).tolist() == [0, 1]
  assert budget.choose(log_p, 9.0, GMACS).tolist() == [0, 0]
  assert budget.choose(log_p, -9.0, GMACS).tolist() == [2, 2]


def test_the_trained_router_is_lambda_zero(calibration):
  record = make_record(2000)
  point = calibration.at(calibration.gmacs, 0.0)
  routed = policies.routed(record)
  assert point.gmacs == pytest.approx(routed.gmacs)
  assert point.top1 == pytest.approx(routed.top1)


@pytest.mark.parametrize('gmacs', np.linspace(1.25, 4.25, 13))
def test_a_budget_is_met_on_the_calibration_images(calibration, gmacs):
  point = calibration.find(gmacs=gmacs)
  assert point.cost == pytest.approx(gmacs, rel=1e-9)
  assert point.gmacs == pytest.approx(gmacs, rel=1e-9)


def test_a_budget_holds_on_other_images(calibration):
  checks = calibrate.check(calibration, make_record(4000, seed=1), 12)
  assert len({round(c.got.gmacs, 6) for c in checks}) == 12
  for c in checks:
    assert c.got.gmacs == pytest.approx(c.asked, rel=0.03)
    assert c.got.top1 == pytest.approx(c.promised, abs=0.03)


def test_a_coarse_router_still_meets_its_budget():
  """All images alike: no lambda lies between two sizes, a share does."""
  record = make_record(1000)
  flat = dataclasses.replace(
    record, log_p=np.log(np.tile([0.2, 0.5, 0.3], (1000, 1)))
  )
  calibration = budget.Calibration.of(flat, split='validation')
  point = calibration.find(gmacs=1.75)  # half at 1, half at 2
  assert point.dial.share == pytest.approx(0.5)
  views = list(np.random.default_rng(0).integers(0, 256, (1000, 4), np.uint8))
  choice = point.dial(flat.log_p, views)
  assert 0.45 < (choice == 0).mean() < 0.55
  assert set(choice.tolist()) == {0, 1}
  # The same image is always treated alike, whatever else is in the batch.
  again = point.dial(flat.log_p[:10], views[::-1][:10])
  np.testing.assert_array_equal(again, choice[::-1][:10])


def test_milliseconds_need_measured_costs(calibration):
  with pytest.raises(UserError, match='no milliseconds'):
    calibration.find(ms=10)
  measured = budget.read_json(calibration.to_json())
  measured.ms = budget.Costs('ms', (10.0, 30.0, 40.0), 2.0, 'a test')
  point = measured.find(ms=27)
  assert point.cost == pytest.approx(27)
  assert point.dial.costs == (10.0, 30.0, 40.0)
  assert 25 == pytest.approx(np.dot(point.shares, (10, 30, 40)))


def test_an_accuracy_is_reached_as_cheaply_as_can_be(calibration):
  point = calibration.find(accuracy=0.8)
  assert point.top1 >= 0.8
  dearer = calibration.find(accuracy=0.85)
  assert dearer.top1 >= 0.85 and dearer.cost > point.cost
  with pytest.raises(UserError, match='the best is'):
    calibration.find(accuracy=0.99)


@pytest.mark.parametrize(
  'asked, message',
  [
    ({'gmacs': 1.2}, 'choose between 1.25 .* and 4.25'),
    ({'gmacs': 4.3}, 'out of reach'),
    ({}, 'one budget'),
    ({'gmacs': 2, 'ms': 3}, 'one budget'),
  ],
)
def test_what_cannot_be_asked_for(calibration, asked, message):
  with pytest.raises(UserError, match=message):
    calibration.find(**asked)


def test_a_calibration_read_back_is_the_same(calibration, tmp_path):
  assert budget.read(str(tmp_path)) is None
  calibration.ms = budget.Costs('ms', (1.0, 2.0, 5.0), 0.5, 'a test')
  calibration.write(str(tmp_path))
  again = budget.read(str(tmp_path))
  assert again.find(gmacs=2.0) == calibration.find(gmacs=2.0)
  assert again.find(ms=3.0) == calibration.find(ms=3.0)
  (tmp_path / budget.FILE).write_text('{')
  with pytest.raises(UserError, match='calibrate again'):
    budget.read(str(tmp_path))


def test_cascade_by_hand():
  record = dataclasses.replace(
    make_record(3),
    confidence=np.array([[0.9, 0.9, 0.9], [0.2, 0.8, 0.9], [0.2, 0.3, 0.4]]),
    predicted=np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]),
  )
  policy = policies.cascade(record, 0.7)
  # Every size that was tried is paid for: 1, 1 + 2, 1 + 2 + 4.
  assert policy.gmacs == pytest.approx((1 + 3 + 7) / 3)
  assert policy.top1 == 1.0
  assert policies.cascade(record, 0.0).gmacs == 1.0
  curve = policies.cascade_curve(make_record(500))
  assert curve[0].gmacs < curve[-1].gmacs
