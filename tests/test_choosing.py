# SPDX-License-Identifier: Apache-2.0
"""Choosing on records small enough to work out by hand, and on large ones."""

import dataclasses
import io
import itertools
import os

import numpy as np
import pytest
import test_ranet_network
from records import CHOICE, RIGHT, make_record

from drnet_jax.choosing import (
  calibration,
  exit_shares,
  halves,
  record,
  scores,
  search,
)
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.options import Costs, Options
from drnet_jax.choosing.policy import AT_ONCE, Dial, Policy, decide
from drnet_jax.choosing.record import Record
from drnet_jax.errors import UserError

SIZES = ('10 px', '20 px', '30 px')
GMACS = (1.0, 2.0, 4.0)


def by_hand(right=RIGHT, choice=CHOICE, *, sure=None, predictor=0.5, **changes):
  """A record of sizes alone; `sure` is the confidence of each, [N, R]."""
  if sure is not None:
    changes['confidence'] = np.asarray(sure, float)
  return make_record(right, choice, predictor_gmacs=predictor, **changes)


def synthetic(count, *, seed=0, names=SIZES, gmacs=GMACS, router=True):
  """Images of which later options get more right, and a router that knows.

  Answers are probabilities of ten classes, so means of them exist.
  """
  rng = np.random.default_rng(seed)
  options = Options.of(names)
  label = rng.integers(0, 10, count)
  hard = rng.normal(0, 1, count)
  skill = np.linspace(0.3, 2.2, len(names))
  logits = rng.normal(0, 1, (count, len(names), 10))
  rows = np.arange(count)[:, None], np.arange(len(names)), label[:, None]
  logits[rows] += 2.5 + skill - 1.2 * hard[:, None]
  p = np.exp(logits)
  p = (p / p.sum(-1, keepdims=True)).astype(np.float32)
  scores_ = np.outer(hard, np.linspace(-1, 1, len(names)))
  scores_ += rng.normal(0, 0.7, scores_.shape)
  log_p = scores_ - np.log(np.exp(scores_).sum(1, keepdims=True))
  return Record(
    options=options,
    costs=Costs('GMACs', tuple(gmacs), 0.2 * router, 'made up'),
    label=label,
    columns=options.columns,
    **record.said(p, label, options.columns),
    log_p=log_p.astype(np.float32) if router else None,
    draw=rng.random(count),
    extra={'index': np.arange(count)},
    probabilities=p,
  )


def router(found, **dial):
  return policy_lib.router(found.costs, (0, 1, 2), **dial)


def test_fixed():
  small, medium, large = scores.fixed_scores(by_hand())
  assert [p.top1 for p in (small, medium, large)] == [0.25, 0.5, 0.75]
  assert (small.gmacs, large.gmacs) == (1.0, 4.0)


def test_a_router_counts_its_predictor():
  found = scores.score(router(by_hand()), by_hand(), 'router')
  assert found.top1 == 0.75
  assert found.gmacs == (1 + 2 + 4 + 1) / 4 + 0.5
  assert found.shares.tolist() == [0.5, 0.25, 0.25]


def test_smallest_sufficient():
  right = [[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
  found = by_hand(right, [0] * 5)
  assert scores.smallest_sufficient(found).tolist() == [0, 1, 1, 2, 3]


def test_oracle_is_the_smallest_correct_size():
  best = scores.oracle(by_hand())
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
  assert scores.hull_top1(by_hand(), gmacs) == pytest.approx(top1)


def test_sizes_under_the_hull_do_not_count():
  # medium is right nowhere: the hull goes straight from small to large
  found = by_hand([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]])
  assert scores.hull_top1(found, 2.5) == pytest.approx(0.5)
  # large is more expensive and no better than medium: the hull ends there
  found = by_hand([[1, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]])
  assert scores.hull_top1(found, 4.0) == pytest.approx(0.75)
  hull, _ = scores.upper_hull(found.gmacs, found.top1.mean(0))
  assert hull.tolist() == [1.0, 2.0]


def test_random_costs_what_was_asked():
  shares, table = np.array([0.5, 0.25, 0.25]), np.array(GMACS)
  # They cost 2; 2.5 shifts a quarter to the largest (+.5 / 2).
  blind = scores.blind_shares(shares, table, 2.5)
  np.testing.assert_allclose(blind, [0.375, 0.1875, 0.4375])
  assert blind @ table == pytest.approx(2.5)
  assert scores.blind_shares(shares, table, 1.2) @ table == pytest.approx(1.2)
  assert scores.blind_shares(shares, table, 99.0) @ table == pytest.approx(4.0)


def test_blind_routing_gains_nothing():
  """A router that chooses by chance must score as random does."""
  rng = np.random.default_rng(0)
  right = (rng.random((20_000, 3)) < [0.5, 0.6, 0.7]).astype(int)
  found = by_hand(right, rng.integers(0, 3, 20_000), predictor=0.0)
  judged = scores.judge(found, router(found), name='router', resamples=20)
  assert abs(judged.random.gain.value) < 0.01


# A cascade by hand: how sure each size is of each image.
SURE = [[0.9, 0.9, 0.9], [0.2, 0.8, 0.9], [0.3, 0.4, 0.9], [0.1, 0.7, 0.3]]


def test_a_cascade_stops_where_it_is_sure_and_pays_for_all():
  found = by_hand(sure=SURE)
  cascade = Policy((0, 1, 2), None, (0.5, 0.5))
  decided = decide(cascade, found, found.costs)
  assert decided.last.tolist() == [0, 1, 2, 1]
  assert decided.cost.tolist() == [1, 1 + 2, 1 + 2 + 4, 1 + 2]
  assert scores.score(cascade, found, '').top1 == 0.75
  skipping = Policy((0, 2), None, (0.5,))
  assert decide(skipping, found, found.costs).cost.tolist() == [1, 5, 5, 5]


def test_a_routed_cascade_starts_where_the_predictor_says():
  found = by_hand(sure=SURE)
  policy = Policy((0, 1, 2), Dial(GMACS), (0.5, 0.75))
  decided = decide(policy, found, found.costs)
  assert decided.first.tolist() == [0, 1, 2, 0]
  assert decided.last.tolist() == [0, 1, 2, 2]  # .1, then .7: on and on
  assert decided.cost.tolist() == [1.5, 2.5, 4.5, 7.5]


def test_a_threshold_that_is_met_stops_and_nan_does():
  policy = Policy((0, 1), None, (0.5,))
  signal = np.array([0.4, 0.5, 0.6, np.nan])
  assert policy.leaves(0, signal).tolist() == [False, True, True, True]
  assert policy.leaves(1, signal).all()


def test_exits_pay_what_they_add_and_sizes_pay_whole():
  sizes, exits = Options.of(SIZES), Options.of(['exit 1', 'exit 2', 'exit 3'])
  costs = Costs('GMACs', GMACS, 0.0, '')
  every = (0, 1, 2)
  assert costs.of_path(sizes, every)[0].tolist() == [1, 3, 7]
  assert costs.of_path(exits, every)[0].tolist() == [1, 2, 4]
  assert costs.of_path(exits, (0, 2))[0].tolist() == [1, 4]
  assert costs.of_path(exits, every)[1].tolist() == [0, 2, 4]
  # A small network with exits, then two sizes of another.
  both = Options.join({'a': exits, 'b': Options.of(['10 px', '20 px'])})
  assert both.names[3] == 'b: 10 px' and both.chain == (0, 0, 0, -1, -1)
  costs = Costs('GMACs', (*GMACS, 5.0, 9.0), 0.0, '')
  assert costs.of_path(both, (0, 2, 4))[0].tolist() == [1, 4, 13]


def test_pooled_answers_are_means_of_what_was_run():
  found = synthetic(500)
  policy = Policy((0, 1, 2), None, (0.3, 0.3), 'pooled')
  decided = decide(policy, found, found.costs)
  p, rows = found.probabilities, np.arange(500)
  mean = np.stack([p[:, : i + 1].mean(1) for i in range(3)], 1)
  two = np.sort(mean, -1)[..., -2:]
  margin = two[..., 1] - two[..., 0]
  stop = np.where(margin[:, 0] >= 0.3, 0, np.where(margin[:, 1] >= 0.3, 1, 2))
  assert decided.last.tolist() == stop.tolist()
  assert (
    found.predicted[rows, decided.column].tolist()
    == mean[rows, stop].argmax(-1).tolist()
  )
  assert len(set(stop.tolist())) == 3


def test_choice_of_a_dial_by_hand():
  log_p = np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])

  def choose(penalty):
    return Dial(GMACS, penalty, penalty)(log_p, None).tolist()

  assert choose(0.0) == [0, 2]
  # log .7 - log .2 = 1.25 for 2 GMACs more: lambda over .63 moves the second.
  assert choose(0.62) == [0, 2]
  assert choose(0.64) == [0, 1]
  assert choose(9.0) == [0, 0]
  assert choose(-9.0) == [2, 2]


def test_a_share_of_the_images_takes_the_other_lambda_and_always_does():
  log_p = np.log(np.tile([0.2, 0.5, 0.3], (1000, 1)))
  table = np.array(GMACS)
  lambdas = search.turns(log_p, table)
  dial = Dial(GMACS, **search.met(log_p, table, lambdas, 1.75))
  assert dial.share == pytest.approx(0.25)  # a quarter at 1, the rest at 2
  draw = np.random.default_rng(0).random(1000)
  choice = dial(log_p, draw)
  assert 0.2 < (choice == 0).mean() < 0.3
  assert set(choice.tolist()) == {0, 1}
  again = dial(log_p[:10], draw[::-1][:10])
  np.testing.assert_array_equal(again, choice[::-1][:10])


@pytest.mark.parametrize('budget', np.linspace(1.0, 4.0, 7))
def test_a_dial_meets_a_budget(budget):
  found, table = synthetic(2000), np.array(GMACS)
  log_p = found.log_p.astype(np.float64)
  fields = search.met(log_p, table, search.turns(log_p, table), budget)
  cost = [
    table[(log_p - fields[name] * table).argmax(-1)].mean()
    for name in ('low', 'high')
  ]
  share = fields['share']
  mixed = (1 - share) * cost[0] + share * cost[1]
  assert mixed == pytest.approx(budget, rel=1e-9)


# The search.


def frontiers_of(made):
  return search.frontiers(search.tried(made, made.costs), made.costs)


@pytest.fixture(scope='module')
def held_out():
  return synthetic(3000)


@pytest.fixture(scope='module')
def found(held_out):
  return frontiers_of(held_out)


def test_frontiers_ascend_and_score_what_they_say(found, held_out):
  assert set(found) == {*policy_lib.FAMILIES, 'best'}
  for family, points in found.items():
    costs = [p.cost for p in points]
    assert costs == sorted(costs)
    assert [p.top1 for p in points] == sorted(p.top1 for p in points)
    for point in points[:: max(len(points) // 5, 1)]:
      score = scores.score(point.policy, held_out, family)
      assert score.gmacs == pytest.approx(point.gmacs)
      assert score.top1 == pytest.approx(point.top1)
      assert point.policy.family == family or family == 'best'


def test_thresholds_are_as_good_as_any_pair(found, held_out):
  """Against every pair of a fine grid, for the path of all sizes."""
  grid = np.quantile(held_out.margin[:, :3], np.linspace(0.02, 0.98, 25))
  points = found['cascade']
  worse = []
  for limits in itertools.product(grid, grid):
    rival = search.at(Policy((0, 1, 2), None, limits), held_out, held_out.costs)
    ours = max(
      (p.top1 for p in points if p.cost <= 1.005 * rival.cost), default=0.0
    )
    worse.append(rival.top1 - ours)
  assert max(worse) < 0.004


def test_what_is_found_holds_on_other_images(found):
  test = synthetic(6000, seed=1)
  for point in found['best'][::5]:
    score = scores.score(point.policy, test, '')
    assert score.gmacs == pytest.approx(point.gmacs, rel=0.05)
    assert score.top1 == pytest.approx(point.top1, abs=0.015)
  best = scores.score(found['best'][-1].policy, test, '')
  assert best.top1 > test.top1.mean(0).max()


def test_the_best_is_no_worse_than_any_family(found):
  for family in policy_lib.FAMILIES:
    for point in found[family]:
      rivals = [
        p.top1
        for p in found['best']
        if p.cost <= point.cost + search._GAP * GMACS[-1]
      ]
      assert max(rivals) >= point.top1


def test_a_router_as_trained_is_in_its_family(found, held_out):
  trained = search.at(router(held_out), held_out, held_out.costs)
  close = [p for p in found['router'] if p.cost <= trained.cost]
  assert close[-1].top1 >= trained.top1 - 0.002


def test_exits_are_tried_in_order_and_sizes_in_subsets():
  exits = synthetic(
    100,
    names=[f'exit {k}' for k in range(1, 7)],
    gmacs=range(1, 7),
    router=False,
  )
  assert search.paths(exits, exits.costs) == [(0, 1, 2, 3, 4, 5)]
  sizes = synthetic(100)
  assert search.paths(sizes, sizes.costs) == [(0, 1), (0, 2), (1, 2), (0, 1, 2)]
  assert 'router' not in search.tried(exits, exits.costs)


def test_milliseconds_are_searched_by_themselves(held_out):
  """A machine on which the middle size costs no more than the small one."""
  ms = Costs('ms', (1.0, 1.0, 4.0), 0.1, 'made up')
  made = Calibration.of(held_out, split='s', ms=ms)
  point = made.find(ms=1.3)
  assert point.policy.path[0] == 1 and point.cost <= 1.3
  assert point.gmacs > 2
  with pytest.raises(UserError, match='no milliseconds were measured'):
    Calibration.of(held_out, split='s').find(ms=1.3)


# Calibration.


@pytest.fixture(scope='module')
def calibrated(held_out):
  return Calibration.of(held_out, split='validation')


def test_a_budget_is_kept_to_and_used(calibrated):
  for gmacs in np.linspace(1.1, 3.0, 12):
    point = calibrated.find(gmacs=gmacs)
    assert 0.97 * gmacs <= point.cost <= gmacs * (1 + 1e-9)


def test_an_accuracy_is_reached_at_the_least_cost(calibrated):
  best = calibrated.points['GMACs']['best']
  point = calibrated.find(accuracy=best[10].top1)
  assert point == best[10]
  assert calibrated.find(accuracy=best[10].top1 - 1e-6) == point


def shortfall(policy, made):
  """Most that it may be below an option, with 95 % confidence of each."""
  right = decide(policy, made, made.costs).right
  lost = made.top1.astype(int) - right[:, None]
  count = len(right)
  error = np.maximum(lost.std(0, ddof=1) / np.sqrt(count), 1 / count)
  return np.where(lost.any(0), lost.mean(0) + 1.96 * error, 0).max()


def test_without_a_budget_accuracy_is_surely_kept(calibrated, held_out):
  point = calibrated.find()
  assert shortfall(point.policy, held_out) <= calibration.TOLERANCE
  tried = search.tried(held_out, held_out.costs)
  cheaper = [
    p for some in tried.values() for p in some if p.gmacs < point.gmacs
  ]
  least = held_out.top1.mean(0).max() - calibration.TOLERANCE
  lucky = [p for p in cheaper if p.top1 >= least]
  assert lucky  # they keep it on these images
  for p in lucky:
    assert shortfall(p.policy, held_out) > calibration.TOLERANCE
  # A family that never gets there gives the most that it has.
  fixed = calibrated.find(policy='fixed')
  assert fixed.top1 == pytest.approx(held_out.top1.mean(0).max())


def test_without_a_budget_time_counts_where_it_was_measured(held_out):
  """A small size takes nearly as long as a large one, or next to nothing."""
  held_out = held_out.some(slice(1000))
  by_macs = Calibration.of(held_out, split='x').find()
  assert by_macs.policy.family != 'fixed'
  slow, fast = (
    Costs('ms', (small, 3.95, 4.0), 0.1, 'made up') for small in (3.9, 0.01)
  )
  found = Calibration.of(held_out, split='x', ms=slow).find()
  assert found.policy == policy_lib.fixed(2) and found.cost == 4
  found = Calibration.of(held_out, split='x', ms=fast).find()
  assert 0 in found.policy.path and found.cost < 4
  paid = decide(found.policy, held_out, fast).cost.mean()
  assert found.cost == pytest.approx(paid)
  assert shortfall(found.policy, held_out) <= calibration.TOLERANCE


def test_few_images_do_not_tell_what_a_saving_costs(held_out):
  """Of 99 one image is a point, so nothing is saved on them."""
  few, many = (
    Calibration.of(held_out.some(slice(n)), split='x') for n in (99, None)
  )
  assert few.find().policy == policy_lib.fixed(2)
  assert few.find(policy='cascade') == few.points['GMACs']['cascade'][-1]
  assert many.find().gmacs < few.find().gmacs
  assert few.find(gmacs=2.0).policy.family != 'fixed'


def test_a_cheaper_option_that_was_lucky_is_not_taken():
  """Two images more of 300: six that it alone got, four that it did not."""
  right = np.ones((300, 3), int)
  right[100:, 0] = 0
  right[:14], right[:6, 1], right[6:10, 2] = 0, 1, 1
  found = Calibration.of(make_record(right, None), split='x')
  assert found.points['GMACs']['fixed'][-1].policy == policy_lib.fixed(1)
  assert found.find().policy == policy_lib.fixed(2)


def test_copies_of_an_image_make_nothing_surer():
  """Of 2,000 images, or of twenty and 99 copies of each."""
  right = np.zeros((2000, 3), int)
  right[:1900], right[:1890, 1], right[:1000, 0] = 1, 1, 0
  right[1890:1900, 1] = 0
  images = make_record(right, None, extra={'original': np.arange(2000)})
  copies = make_record(right, None, extra={'original': np.arange(2000) // 100})
  sure, unsure = (
    search.as_accurate([search.at(policy_lib.fixed(1), r, r.costs)], r, 0.009)
    for r in (images, copies)
  )
  assert sure is not None and unsure is None


@pytest.mark.parametrize(
  'asked, says',
  [
    ({'gmacs': 0.5}, 'out of reach: the least is 1'),
    ({'accuracy': 0.9999}, 'on the calibration images the best is'),
    ({'gmacs': 2.0, 'accuracy': 0.5}, 'set one budget'),
    ({'policy': 'oracle'}, 'is not one of'),
  ],
)
def test_what_cannot_be_found_is_said(calibrated, asked, says):
  with pytest.raises(UserError, match=says):
    calibrated.find(**asked)


def test_calibrations_survive_the_disk(calibrated, held_out, tmp_path):
  calibrated.write(str(tmp_path))
  back = calibration.read(str(tmp_path))
  assert back == calibrated
  calibration.write_record(str(tmp_path), held_out)
  kept = calibration.read_record(str(tmp_path))
  again = Calibration.of(kept, split='validation')
  assert again == calibrated
  assert calibration.read(str(tmp_path / 'nowhere')) is None


@pytest.mark.parametrize('text', ['{', '{"format": 0}'])
def test_a_damaged_calibration_is_named(tmp_path, text):
  (tmp_path / calibration.FILE).write_text(text)
  with pytest.raises(UserError, match='calibrate, or export, again'):
    calibration.read(str(tmp_path))


def test_a_calibration_of_version_4_is_none(tmp_path):
  """It holds other things; `calibrate` and `main` make one anew."""
  text = '{"split": "validation", "log_p": [], "gmacs": []}'
  (tmp_path / calibration.FILE).write_text(text)
  assert calibration.read(str(tmp_path)) is None


def test_policies_are_described(calibrated):
  options = calibrated.options
  text = policy_lib.describe(Policy((0, 2), None, (0.25,), 'pooled'), options)
  assert text == (
    'cascade 10, 30 px, on while the margin is under 0.25, answers pooled'
  )
  assert policy_lib.describe(policy_lib.fixed(1), options) == 'fixed 20 px'


# Records.


@pytest.mark.parametrize('count', [4, 5])
def test_columns_are_options_and_means(count):
  columns = Options.of([f'{k} px' for k in range(count)]).columns
  assert columns[:count] == tuple((k,) for k in range(count))
  if count == 4:
    assert len(columns) == 2**4 - 1
  else:  # all that a cascade may try, and neighbours
    assert (0, 2, 4) in columns and (0, 1, 2, 3, 4) in columns
    assert (0, 1, 2, 4) not in columns
  assert len(set(columns)) == len(columns)


def test_columns_of_exits_are_neighbours():
  columns = Options.of([f'exit {k}' for k in range(6)]).columns
  assert (0, 2) not in columns and (1, 2, 3) in columns


def test_what_columns_say():
  p = np.array([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]], np.float32)
  said = record.said(p, np.array([2]), [(0,), (1,), (0, 1)])
  assert said['predicted'].tolist() == [[0, 2, 2]]
  np.testing.assert_allclose(said['confidence'], [[0.5, 0.7, 0.45]], atol=1e-6)
  np.testing.assert_allclose(said['margin'], [[0.2, 0.5, 0.15]], atol=1e-6)


def same(a, b):
  for field in dataclasses.fields(Record):
    ours, theirs = getattr(a, field.name), getattr(b, field.name)
    if isinstance(ours, np.ndarray) and field.name != 'probabilities':
      np.testing.assert_array_equal(ours, theirs)
  assert (a.options, a.costs, a.columns) == (b.options, b.costs, b.columns)


@pytest.mark.parametrize('router', [True, False])
def test_records_survive_the_disk(tmp_path, router):
  made = synthetic(50, router=router)
  record.save(made, tmp_path / 'record.npz')
  back = record.load(tmp_path / 'record.npz')
  same(made, back)
  assert (back.log_p is None) != router and back.probabilities is None


def test_records_of_version_0_4_are_read(tmp_path):
  np.savez(
    tmp_path / 'old.npz',
    options=np.array(SIZES),
    gmacs=np.array(GMACS),
    predictor_gmacs=0.5,
    label=np.ones(4, int),
    predicted=RIGHT,
    confidence=np.array(SURE),
    top5=RIGHT > 0,
    log_p=np.log(np.eye(3)[CHOICE] + 1e-9),
    **{'extra.digit_px': np.arange(4)},
  )
  old = record.load(tmp_path / 'old.npz')
  assert old.margin is None and old.draw is None
  assert scores.score(router(old), old, '').gmacs == 2.5
  (cascade, *_) = [p for p in search.cascades(old, old.costs)][-1:]
  assert cascade.policy.signal == 'probability' and cascade.top1 == 0.75


def test_exits_of_a_network_stay_together_in_a_ladder():
  """Their features are handed on: no other option may come between."""
  exits = synthetic(200, names=('exit 1', 'exit 2', 'exit 3'), router=False)
  sizes = synthetic(200, gmacs=(1.5, 3.0, 5.0), router=False)
  both = record.join({'exits': exits, 'sizes': sizes})
  paths = search.paths(both, both.costs)
  assert len(paths) > 5 and any(len(path) == 3 for path in paths)
  for path in paths:
    places = [i for i, j in enumerate(path) if j < 3]
    assert not places or places[-1] - places[0] == len(places) - 1


def test_the_cheapest_of_a_ladder_that_is_right():
  """Its options ascend in cost within a network only."""
  right = np.array([[0, 1, 1], [0, 1, 0], [0, 0, 0]])
  found = by_hand(right=right, choice=None)
  found = dataclasses.replace(
    found, costs=Costs('GMACs', (2.0, 3.0, 1.0), 0.0, '')
  )
  assert scores.smallest_sufficient(found).tolist() == [2, 1, 3]
  bound = scores.oracle(found)
  assert bound.gmacs == pytest.approx((1 + 3 + 1) / 3)
  judged = scores.judge(found, policy_lib.fixed(1), name='it')
  assert judged.oracle.gmacs.value == pytest.approx(bound.gmacs)


def test_many_images_are_thinned_evenly(monkeypatch):
  """In a folder they stand class by class."""
  monkeypatch.setattr(calibration, '_MOST_IMAGES', 50)
  made, seen = synthetic(200), []
  tried = search.tried
  monkeypatch.setattr(
    search, 'tried', lambda r, costs: seen.append(r) or tried(r, costs)
  )
  calibration.Calibration.of(made, split='a split')
  np.testing.assert_array_equal(seen[0].label, made.label[::4])


def test_a_damaged_record_is_one_error(tmp_path):
  path = tmp_path / 'record.npz'
  record.save(synthetic(50), path)
  whole = path.read_bytes()
  assert os.listdir(tmp_path) == ['record.npz']
  array = io.BytesIO()
  np.save(array, np.zeros(3))
  for data in (b'', whole[: len(whole) // 2], b'x' * 100, array.getvalue()):
    path.write_bytes(data)
    with pytest.raises(UserError, match='is damaged .*: delete it, then'):
      record.load(path)
  made = synthetic(50)
  columns = (*made.columns[:-1], ('first', 'last'))
  costs = dataclasses.replace(made.costs, options=('a', 'b', 'c'))
  for changes in (
    {'log_p': made.log_p[1:]},
    {'extra': {'px': np.zeros(49)}},
    {'columns': columns},
    {'costs': costs},
  ):
    record.save(dataclasses.replace(made, **changes), path)
    with pytest.raises(UserError, match='do not fit together: delete it'):
      record.load(path)


def test_networks_are_joined():
  small = synthetic(300, router=False)
  large = synthetic(300, names=('40 px', '50 px'), gmacs=(8.0, 16.0))
  both = record.join({'small': small, 'large': large})
  assert both.options.names[0] == 'small: 10 px'
  assert both.costs.options == GMACS + (8.0, 16.0)
  assert both.costs.predictor == 0.2
  assert policy_lib.routes(both) == (3, 4)
  column = both.column((0, 1, 2, 3))
  mean = np.concatenate([small.probabilities, large.probabilities[:, :1]], 1)
  assert (both.predicted[:, column] == mean.mean(1).argmax(-1)).mean() > 0.99
  ladder = frontiers_of(both)
  assert ladder['best'][-1].top1 > max(
    r.top1.mean(0).max() for r in (small, large)
  )
  with pytest.raises(ValueError, match='other images'):
    record.join({'a': small, 'b': synthetic(300, seed=5)})


def test_a_predictor_of_one_network_of_a_ladder_leaves_the_others_alone():
  small, large = synthetic(300), synthetic(300, router=False)
  large = dataclasses.replace(large, label=small.label)
  both = record.join({'small': small, 'large': large})
  points = frontiers_of(both)['router']
  assert all(set(p.policy.path) == {0, 1, 2} for p in points)


# Intervals.


def test_copies_of_one_original_widen_the_interval():
  """Ten copies each: ten times the images, and no more is known."""
  rng = np.random.default_rng(0)
  value = (rng.random(300) < 0.8).astype(float)
  alone = scores.resampled_means(value[:, None], np.arange(300), 4000)
  copies = np.repeat(value, 10)
  grouped = scores.resampled_means(
    copies[:, None], np.repeat(np.arange(300), 10), 4000
  )
  naive = scores.resampled_means(copies[:, None], np.arange(3000), 4000)
  assert grouped.std() == pytest.approx(alone.std(), rel=0.05)
  assert naive.std() == pytest.approx(alone.std() / np.sqrt(10), rel=0.05)


def test_groups_of_differing_size_are_weighted_by_it():
  columns = np.array([1.0, 1.0, 1.0, 0.0])[:, None]
  means = scores.resampled_means(columns, np.array([0, 0, 0, 1]), 4000)
  assert set(np.round(means[:, 0], 6)) == {0.0, 0.75, 1.0}


def test_originals_are_groups():
  made = by_hand(extra={'original': np.array([7, 3, 7, 9])})
  assert made.groups.tolist() == [1, 0, 1, 2]
  assert by_hand().groups.tolist() == [0, 1, 2, 3]


def test_a_class_of_one_original_has_no_interval():
  made = by_hand(
    label=np.array([0, 0, 1, 1]),
    extra={'original': np.array([5, 5, 6, 7])},
  )
  effects = scores.by_class(made, router(made), ['a', 'b'])
  intervals = {e.name: e.change for e in effects}
  assert np.isnan(intervals['a'].low) and intervals['a'].sign == 0
  assert np.isfinite(intervals['b'].low)


def test_rank_correlation_is_spearman_s():
  """Ranks of ties are shared: (1, 2.5, 2.5, 4) against (1, 2, 3, 4)."""
  a, b = np.array([1, 5, 5, 9]), np.array([1, 2, 3, 4])
  made = by_hand(extra={'size': b, 'index': b})
  (rho,) = scores.rank_correlations(made, a).values()
  assert rho == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
  assert scores.rank_correlations(made, np.ones(4)) == {}


# RANet's rule, against figures of the authors' code.


def of_exits(offset, count=200):
  i = np.arange(count)[:, None] + offset
  k = np.arange(4)
  confidence = ((7919 * i + 104729 * k + 12345) % 10007) / 10007
  right = (31 * i + 17 * k) % 7 < 3 + k
  options = Options.of([f'exit {k + 1}' for k in range(4)])
  return Record(
    options=options,
    costs=Costs('GMACs', (10.0, 20.0, 40.0, 80.0), 0.0, ''),
    label=np.zeros(count, int),
    columns=options.columns[:4],
    predicted=np.where(right, 0, 1),
    confidence=confidence,
    margin=None,
    top5=np.ones_like(right),
    log_p=None,
    draw=None,
    extra={},
  )


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
  held_out, test = of_exits(0), of_exits(1000)
  policy = exit_shares.by_ratio(held_out, ratio)
  np.testing.assert_allclose(10007 * np.array(policy.stop), limits, atol=1e-6)
  for images, (top1, cost) in ((held_out, calibrated), (test, tested)):
    score = scores.score(policy, images, '')
    assert 100 * score.top1 == pytest.approx(top1)
    assert score.gmacs == pytest.approx(cost)
  assert tuple(200 * score.shares) == pytest.approx(counts)


def test_the_search_is_no_worse_than_the_authors_rule():
  held_out = of_exits(0)
  points = search.cascades(held_out, held_out.costs)
  for ratio in exit_shares.RATIOS:
    rival = search.at(
      exit_shares.by_ratio(held_out, ratio), held_out, held_out.costs
    )
    ours = [p.top1 for p in points if p.cost <= rival.cost + 0.4]
    assert max(ours) >= rival.top1


def test_ties_leave_together_and_too_few_all_stay():
  confidence = np.array(
    [[1, 1, 1, 0.5, 0.4, 0.3], [0.2, 0.3, 0.4, 0.9, 0.8, 0.7], [0.1] * 6]
  ).T

  def mean_cost(limits):
    left_at = (confidence >= np.append(limits, AT_ONCE)).argmax(1)
    return np.array([1, 2, 4])[left_at].mean()

  limits = exit_shares.thresholds(confidence, (1 / 6, 3 / 6, 2 / 6))
  assert limits.tolist() == [1.0, 0.7] and mean_cost(limits) == 1.5
  limits = exit_shares.thresholds(confidence, (1 / 6, 4 / 6, 1 / 6))
  assert limits.tolist() == [1.0, np.inf] and mean_cost(limits) == 2.5


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
  listed = test_ranet_network.COSTS[name, classes][0]
  costs = np.array(listed.split(), float) / 1e6
  # The figures of ImageNet are rounded twice: to .01, then to .1.
  rounding = 0.005 if classes == 10 else 0.055
  for ratio, cost in zip((0.05, 0.5, 1, 1.25, 1.95), expected, strict=True):
    planned = exit_shares.geometric_shares(ratio, len(costs)) @ costs
    assert planned == pytest.approx(cost, abs=rounding)


def test_shares_of_extreme_ratios_are_finite():
  for ratio in (1e-9, 1e9):
    shares = exit_shares.geometric_shares(ratio, 8)
    assert shares.sum() == pytest.approx(1) and np.isfinite(shares).all()
  assert shares[-1] == pytest.approx(1)


def test_halves_score_what_they_were_not_set_on():
  made = synthetic(800)
  rows = halves.halves(made, [1.5, 2.5, 3.5], splits=2)
  assert {row['split'] for row in rows} == {0, 1}
  found = {
    row['budget']: row
    for row in halves.summary(rows)
    if row['family'] == 'best'
  }
  assert found[2.5]['gmacs'] == pytest.approx(2.5, rel=0.1)
  assert found[2.5]['gain'] > 0.02
  assert found[2.5]['gain_least'] <= found[2.5]['gain']
  # Without a budget: what keeps the accuracy on the images that it is set on.
  kept = found[halves.NO_BUDGET]
  assert 2.5 < kept['gmacs'] < 4
  assert kept['gain'] > 0 and kept['top1'] > found[2.5]['top1']
  lost = [
    row['largest'] - row['top1']
    for row in rows
    if row['budget'] == halves.NO_BUDGET
  ]
  assert len(lost) == 4
  assert kept['kept'] == np.mean(np.array(lost) <= calibration.TOLERANCE)
  # Of a router that knows nothing, thresholds that fit noise gain nothing.
  blind = dataclasses.replace(made, margin=made.margin[::-1].copy())
  lost = halves.summary(halves.halves(blind, [2.5], splits=2))
  assert next(r for r in lost if r['family'] == 'cascade')['gain'] < 0.01
