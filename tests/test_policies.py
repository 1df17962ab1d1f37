# SPDX-License-Identifier: Apache-2.0
"""The controls on a record small enough to work out by hand."""

import numpy as np
import pytest

from drnet_jax.report import policies

# Correct at (1, 2, 4) GMACs:   small  medium  large   chosen
RIGHT = np.array(
  [
    [1, 1, 1],  # small
    [0, 1, 1],  # medium
    [0, 0, 1],  # large
    [0, 0, 0],  # small
  ]
)
CHOICE = [0, 1, 2, 0]


def make_record(right=RIGHT, choice=CHOICE, **changes):
  right = np.asarray(right)
  fields = {
    'options': np.array(['10 px', '20 px', '30 px']),
    'gmacs': np.array([1.0, 2.0, 4.0]),
    'predictor_gmacs': 0.5,
    'label': np.ones(len(right), int),
    'predicted': right,
    'confidence': np.ones(right.shape),
    'top5': np.ones(right.shape, bool),
    'log_p': np.log(np.eye(3)[choice] + 1e-9),
    'extra': {'digit_px': np.arange(len(right))},
  }
  return policies.Record(**fields | changes)


def test_fixed():
  small, medium, large = policies.fixed(make_record())
  assert [p.top1 for p in (small, medium, large)] == [0.25, 0.5, 0.75]
  assert (small.gmacs, large.gmacs) == (1.0, 4.0)


def test_routed_counts_the_predictor():
  router = policies.routed(make_record())
  assert router.top1 == 0.75
  assert router.gmacs == (1 + 2 + 4 + 1) / 4 + 0.5
  assert router.shares.tolist() == [0.5, 0.25, 0.25]


def test_smallest_sufficient():
  right = [[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
  record = make_record(right, [0] * 5)
  assert policies.smallest_sufficient(record).tolist() == [0, 1, 1, 2, 3]


def test_oracle_is_the_smallest_correct_size():
  best = policies.oracle(make_record())
  assert best.top1 == 0.75
  assert best.gmacs == (1 + 2 + 4 + 1) / 4  # hopeless images run small


@pytest.mark.parametrize(
  'gmacs, top1',
  [
    (0.5, 0.25),
    (1.0, 0.25),
    (1.5, 0.375),  # half way from (1, .25) to (2, .5)
    (3.0, 0.625),  # half way from (2, .5) to (4, .75)
    (9.0, 0.75),
  ],
)
def test_best_fixed_is_the_hull(gmacs, top1):
  assert policies.best_fixed(make_record(), gmacs).top1 == pytest.approx(top1)


def test_sizes_under_the_hull_do_not_count():
  # medium is right nowhere: the hull goes straight from small to large
  record = make_record([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]])
  assert policies.best_fixed(record, 2.5).top1 == pytest.approx(0.5)
  # large is dearer and no better than medium: the hull ends there
  record = make_record([[1, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]])
  assert policies.best_fixed(record, 4.0).top1 == pytest.approx(0.75)
  assert policies.hull_points(record)[0].tolist() == [1.0, 2.0]


def test_random_costs_what_was_asked():
  record = make_record()
  # The router's shares cost 2; 2.5 shifts a quarter to the largest (+.5 / 2).
  blind = policies.random_choice(record, 2.5)
  assert blind.gmacs == pytest.approx(2.5)
  np.testing.assert_allclose(blind.shares, [0.375, 0.1875, 0.4375])
  expected = 0.375 * 0.25 + 0.1875 * 0.5 + 0.4375 * 0.75
  assert blind.top1 == pytest.approx(expected)
  assert policies.random_choice(record, 1.2).gmacs == pytest.approx(1.2)
  assert policies.random_choice(record, 99.0).gmacs == pytest.approx(4.0)


def test_blind_routing_gains_nothing():
  """A router that chooses by chance must score as random does."""
  rng = np.random.default_rng(0)
  right = rng.random((20_000, 3)) < [0.5, 0.6, 0.7]
  record = make_record(right, rng.integers(0, 3, 20_000), predictor_gmacs=0.0)
  router = policies.routed(record)
  blind = policies.random_choice(record, router.gmacs)
  assert abs(router.top1 - blind.top1) < 0.01


def test_without_a_predictor_nothing_is_routed():
  names = [p.name for p in policies.all_policies(make_record(log_p=None))]
  assert names == ['fixed 10 px', 'fixed 20 px', 'fixed 30 px', 'oracle']


@pytest.mark.parametrize('changes', [{}, {'log_p': None}])
def test_records_survive_the_disk(tmp_path, changes):
  record = make_record(**changes)
  policies.save(record, tmp_path / 'record.npz')
  back = policies.load(tmp_path / 'record.npz')
  for ours, theirs in zip(
    policies.all_policies(record), policies.all_policies(back), strict=True
  ):
    assert (ours.name, ours.gmacs, ours.top1) == (
      theirs.name,
      theirs.gmacs,
      theirs.top1,
    )
  assert back.extra['digit_px'].tolist() == [0, 1, 2, 3]
