# SPDX-License-Identifier: Apache-2.0
"""Thresholds of exits, against figures of the authors' code."""

import numpy as np
import pytest
from test_ranet_network import COSTS

from drnet_jax.report import exits
from drnet_jax.report.policies import Record


def make_record(offset, count=200):
  i = np.arange(count)[:, None] + offset
  k = np.arange(4)
  confidence = ((7919 * i + 104729 * k + 12345) % 10007) / 10007
  right = (31 * i + 17 * k) % 7 < 3 + k
  return Record(
    options=np.array([f'exit {k + 1}' for k in range(4)]),
    gmacs=np.array([10.0, 20.0, 40.0, 80.0]),
    predictor_gmacs=0.0,
    label=np.zeros(count, int),
    predicted=np.where(right, 0, 1),
    confidence=confidence,
    top5=np.ones_like(right),
    log_p=None,
    extra={},
  )


def sweep(calibration, test, *ratios):
  return exits.sweep(calibration.confidence, calibration.top1, test, *ratios)


@pytest.mark.parametrize(
  'ratio, limits, calibrated, tested, counts',
  [
    (0.25, (2463, 5265, 9491), (46.5, 14.6), (49.0, 14.3), (150, 38, 9, 3)),
    (0.5, (4705, 6689, 783), (55.0, 21.8), (52.5, 22.1), (106, 52, 26, 16)),
    (1.0, (7553, 7478, 5084), (66.0, 37.5), (66.5, 38.1), (48, 51, 49, 52)),
    (1.5, (8852, 8190, 6152), (71.0, 49.8), (72.5, 49.9), (24, 37, 53, 86)),
    (1.95, (9314, 8623, 6739), (74.5, 56.4), (74.5, 56.7), (14, 28, 50, 108)),
  ],
)
def test_thresholds_are_the_authors(ratio, limits, calibrated, tested, counts):
  (found,) = sweep(make_record(0), make_record(1000), [ratio])
  np.testing.assert_allclose(10007 * found.thresholds[:3], limits, atol=1e-6)
  assert found.thresholds[3] == -np.inf
  for policy, (top1, cost) in (
    (found.calibrated, calibrated),
    (found.tested, tested),
  ):
    assert 100 * policy.top1 == pytest.approx(top1)
    assert policy.gmacs == pytest.approx(cost)
  assert tuple(200 * found.tested.shares) == pytest.approx(counts)


def test_ties_leave_together_and_too_few_all_stay():
  confidence = np.array(
    [[1, 1, 1, 0.5, 0.4, 0.3], [0.2, 0.3, 0.4, 0.9, 0.8, 0.7], [0.1] * 6]
  ).T
  costs = np.array([1, 2, 4])
  limits = exits.thresholds(confidence, (1 / 6, 3 / 6, 2 / 6))
  assert limits.tolist() == [1.0, 0.7, -np.inf]
  assert costs[exits.leave_at(confidence, limits)].mean() == 1.5
  limits = exits.thresholds(confidence, (1 / 6, 4 / 6, 1 / 6))
  assert limits.tolist() == [1.0, np.inf, -np.inf]
  assert costs[exits.leave_at(confidence, limits)].mean() == 2.5


@pytest.mark.parametrize(
  'name, classes, expected',
  [
    ('cifar_anytime', 10, (16.62, 28.53, 56.44, 68.64, 84.12)),
    ('cifar_budgeted_small', 10, (9.06, 19.21, 36.11, 42.43, 51.29)),
    ('cifar_budgeted_medium', 10, (11.44, 22.62, 56.72, 73.90, 97.83)),
    ('cifar_budgeted_large', 10, (11.43, 25.30, 82.65, 111.96, 150.40)),
    ('imagenet_budgeted_small', 1000, (266.3, 580.5, 1546.5, 1990.2, 2529.4)),
    ('imagenet', 1000, (458.4, 821.6, 1908.4, 2403.7, 3003.5)),
  ],
)
def test_planned_costs_are_the_authors(name, classes, expected):
  """What the shares of a ratio cost, in M, at the costs of the exits."""
  costs = np.array(COSTS[name, classes][0].split(), float) / 1e6
  # The figures of ImageNet are rounded twice: to .01, then to .1.
  rounding = 0.005 if classes == 10 else 0.055
  for ratio, cost in zip((0.05, 0.5, 1, 1.25, 1.95), expected, strict=True):
    planned = exits.geometric_shares(ratio, len(costs)) @ costs
    assert planned == pytest.approx(cost, abs=rounding)


def test_shares_of_extreme_ratios_are_finite():
  for ratio in (1e-9, 1e9):
    shares = exits.geometric_shares(ratio, 8)
    assert shares.sum() == pytest.approx(1) and np.isfinite(shares).all()
  assert shares[-1] == pytest.approx(1)


def test_the_best_network_is_chosen_on_calibration_images():
  one = sweep(make_record(0), make_record(1000))
  other = sweep(make_record(50), make_record(2000))[::2]
  best = exits.best_of([one, other])
  scores = [s.calibrated.top1 for _, s in best]
  costs = [s.calibrated.gmacs for _, s in best]
  assert scores == sorted(set(scores)) and costs == sorted(costs)
  for _, s in best:
    rivals = [
      r.calibrated.top1
      for r in one + other
      if r.calibrated.gmacs <= s.calibrated.gmacs
    ]
    assert s.calibrated.top1 == max(rivals)
