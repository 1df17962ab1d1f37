# SPDX-License-Identifier: Apache-2.0
"""The report: numbers worked out by hand, what it says of them, its page."""

import csv
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from records import make_record, router

from configs import smoke
from drnet_jax import settings
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing import scores
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.options import Costs
from drnet_jax.choosing.scores import Interval
from drnet_jax.commands import report as command
from drnet_jax.errors import UserError
from drnet_jax.report import (
  evaluated,
  page,
  pictures,
  plots,
  run_page,
  run_set,
  set_page,
  wording,
)
from drnet_jax.report.paper_tables import TABLES
from drnet_jax.run import workdir

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


def images(count=2000, *, gain=0.0, seed=0, **changes):
  """Sizes right half, .6 and .7 of the time; a router that hits by `gain`.

  Without a gain it chooses by chance; with 1 it is right wherever a size is;
  with -1 it is wrong wherever a size is.
  """
  rng = np.random.default_rng(seed)
  right = rng.random((count, 3)) < [0.5, 0.6, 0.7]
  choice = rng.integers(0, 3, count)
  informed = rng.random(count) < abs(gain)
  wish = right if gain > 0 else ~right
  choice = np.where(informed & wish.any(1), wish.argmax(1), choice)
  return make_record(right, choice, **{'predictor_gmacs': 0.0} | changes)


def judge(record, **options):
  """The router of a record among its rivals."""
  return scores.judge(record, router(record), name='router', **options)


def answers(record, **options):
  """What is said of the router of a record."""
  return wording.answers(judge(record, **options), record, router(record))


def test_an_interval_is_that_of_the_normal_distribution():
  rng = np.random.default_rng(0)
  values = (rng.random(4000) < 0.8).astype(float)
  found = scores.difference(
    values, np.zeros(4000), np.arange(4000), resamples=4000
  )
  margin = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 4000)
  assert found.value == pytest.approx(values.mean())
  assert found.high - found.value == pytest.approx(margin, rel=0.06)
  assert found.value - found.low == pytest.approx(margin, rel=0.06)


def test_copies_of_one_original_are_drawn_together():
  """Four of each are worth a quarter of the images: twice the interval."""
  rng = np.random.default_rng(0)
  originals = (rng.random(1000) < 0.8).astype(float)
  groups = np.repeat(np.arange(1000), 4)
  one, four = (
    scores.difference(x, np.zeros(len(x)), g, resamples=2000)
    for x, g in (
      (originals, np.arange(1000)),
      (np.repeat(originals, 4), groups),
    )
  )
  assert four == one
  alone = scores.difference(
    np.repeat(originals, 4), np.zeros(4000), np.arange(4000), resamples=2000
  )
  width = (four.high - four.low) / (alone.high - alone.low)
  assert width == pytest.approx(2, rel=0.1)
  record = images(40, extra={'original': np.repeat(np.arange(10) + 7, 4)})
  assert record.groups.tolist() == np.repeat(np.arange(10), 4).tolist()


def test_differences_are_paired():
  """Two rows that are right on the same images differ by nothing at all."""
  record = images()
  record = make_record(
    record.predicted, [1] * len(record.label), predictor_gmacs=0.0
  )
  found = judge(record, resamples=100)
  same = found.fixed[1]
  assert same.gain == Interval(0.0, 0.0, 0.0)
  assert same.top1.high - same.top1.low > 0.02
  assert found.policy.shares.tolist() == [0, 1, 0]


def test_a_judgement_agrees_with_the_scores():
  record = images(gain=0.5, predictor_gmacs=0.5)
  found = judge(record, resamples=50)
  routed = scores.score(router(record), record, 'router')
  known = {s.name: s for s in (*scores.fixed_scores(record), routed)}
  known['oracle'] = scores.oracle(record)
  assert {s.name for s in found.all} - {*known} == {'best fixed', 'random'}
  hull = scores.hull_top1(record, routed.gmacs)
  assert found.best_fixed.top1.value == pytest.approx(hull)
  blind = scores.blind_shares(routed.shares, record.gmacs, routed.gmacs)
  assert found.random.gmacs.value == pytest.approx(routed.gmacs)
  assert found.random.top1.value == pytest.approx(blind @ record.top1.mean(0))
  for scored in found.all:
    if plain := known.get(scored.name):
      assert scored.top1.value == pytest.approx(plain.top1, abs=1e-6)
      assert scored.gmacs.value == pytest.approx(plain.gmacs, rel=1e-6)
    assert scored.gain.value == pytest.approx(
      routed.top1 - scored.top1.value, abs=1e-6
    )
    assert scored.top1.low < scored.top1.value < scored.top1.high
  assert found.saving.value == pytest.approx(1 - routed.gmacs / 4)


@pytest.mark.parametrize(
  'gain, short, says',
  [
    (0.0, 'Not shown', 'the interval contains zero'),
    (0.6, 'Yes', 'the interval lies above zero'),
    (-0.6, 'No, it loses', 'it loses: -'),
  ],
)
def test_the_headline_says_whether_the_gain_is_real(gain, short, says):
  *_, real, _ = answers(images(gain=gain), resamples=200)
  assert real.question == 'Is the gain real?'
  assert real.short == short and says in real.text


def test_the_headline_says_what_is_saved_and_against_what():
  # Costs 2.5 of 4; right on 3 of 4, as the largest.
  saving, accuracy, gain, how = answers(make_record(), resamples=50)
  assert saving.short == '37.5 % of the work'
  assert 'takes 2.50 GMACs on average, 0.500 GMACs of it' in saving.text
  assert '4.00 GMACs with all images at 30 px.' in saving.text
  assert accuracy.short == '75.0 %'
  assert accuracy.text == (
    'Top-1, against 75.0 % with all images at 30 px: +0.0 [+0.0, +0.0] points.'
  )
  # At 2.5 GMACs the hull has .5 + .25 / 4.
  assert 'the best fixed size at the same cost, 56.2 %,' in gain.text
  assert how.short == 'router 10, 20, 30 px'
  assert how.text.startswith('Images end: ')


def test_the_headline_names_a_single_size_that_is_better_than_the_full_one():
  # Sizes cost 1, 2 and 4, the router 1.25 and its predictor .5.
  right = [[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]]
  record = make_record(right, [0, 0, 1, 0])
  _, accuracy, _, how = answers(record, resamples=50)
  assert 'But 20 px alone is the best size here: 75.0 % at 2' in accuracy.text
  assert 'the router saves 12.5 % and gains +0.0 [' in accuracy.text
  assert how.text.endswith('75.0 % at 10 px, 25.0 % at 20 px, 0.0 % at 30 px.')


@pytest.mark.parametrize(
  'confidence, short',
  [
    (np.ones_like, 'Yes'),  # goes by nothing
    (np.array, 'Yes, but the cascade is better'),  # knows all
  ],
)
def test_a_gain_over_fixed_sizes_alone_is_said_to_be_that(
  tmp_path, confidence, short
):
  record = images(gain=0.4)
  sure = confidence(record.top1).astype(float)
  record = dataclasses.replace(record, confidence=sure, margin=sure)
  run = evaluated.read(str(write_run(tmp_path / 'run', record)))
  found = run.judgement
  assert found.best_fixed.gain.sign == 1
  # As expensive as the router at the most.
  for scored in found.others.values():
    assert scored.gmacs.value <= found.policy.gmacs.value
  assert wording.answers(found, record, run.policy)[2].short == short


def test_commands_are_marked_in_html():
  shown = page.Page(
    'T', '', [], [page.Section('S', text=['Run `a <b>` now, `or` not.'])]
  )
  assert (
    '<p>Run <code>a &lt;b&gt;</code> now, <code>or</code> not.</p>'
    in page.html(shown)
  )


def test_a_router_that_costs_more_saves_nothing():
  saving, *_, how = answers(make_record(choice=[2] * 4), resamples=9)
  assert saving.short == 'Nothing'
  assert '100.0 % at 30 px. This policy has collapsed' in how.text


def test_one_size_for_all_saves_nothing_whatever_it_costs():
  """The mean of a thousand equal costs is not one of them."""
  record = images(3925)
  costs = Costs('GMACs', (0.024461312, 0.080916608, 0.152816), 0.0, '')
  record = dataclasses.replace(record, costs=costs)
  for option in (1, 2):
    policy = policy_lib.fixed(option)
    judged = scores.judge(record, policy, name='best policy', resamples=9)
    saving, accuracy, real, _ = wording.answers(judged, record, policy)
    assert (saving.short == 'Nothing') == (option == 2)
    assert real.short == 'There is none'
    if judged.best_single.name == f'fixed {record.options.names[option]}':
      assert 'But' not in accuracy.text


def test_classes_are_told_apart():
  # Right at the smallest: image 0; at the largest: images 0 to 2.
  label = np.array([0, 1, 1, 1])
  right = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]
  record = make_record(
    choice=[0, 0, 2, 0],
    label=label,
    predicted=np.where(right, label[:, None], 9),
  )
  harmed, same = scores.by_class(record, router(record), ['cat', 'dog'])
  assert (harmed.name, harmed.images, harmed.full) == ('dog', 3, 2 / 3)
  assert harmed.change.value == pytest.approx(-1 / 3)
  # Of (-1, 0, 0): sqrt of the sum of squared residuals, 2 / 3, over 3 - 1,
  # over 3.
  assert harmed.change.high == pytest.approx(-1 / 3 + 1.96 / 3)
  assert harmed.gmacs == pytest.approx((1 + 4 + 1) / 3 + 0.5)
  assert (same.name, same.change.value) == ('cat', 0.0)
  assert np.isnan(same.change.high)  # of one image


def test_markdown_tables():
  table = page.Table(
    header=['', 'a', 'b'],
    groups=[('', 1), ('ours: digits', 2)],
    rows=[['x', '1', ''], ['y', '2', '3']],
    strong=[1],
  )
  assert page.markdown_table(table).splitlines() == [
    '|  | ours: digits: a | ours: b |',
    '| --- | --- | --- |',
    '| x | 1 |  |',
    '| **y** | **2** | **3** |',
  ]


def write_run(path, record):
  """A workdir as far as a report reads it."""
  config = smoke.get_config()
  directory = path / 'report'
  directory.mkdir(parents=True)
  settings.write_json(str(path / 'config.json'), settings.plain(config))
  settings.write_json(str(path / 'classes.json'), ['<b>cat</b>', *'dogs'])
  record_lib.save(record, directory / 'record.npz')
  with open(path / 'metrics.csv', 'w') as file:
    file.write('stage,step,metric,value\n')
    for name in ('entropy', 'hinge', 'share_r10', 'share_r20', 'share_r30'):
      file.write(f'finetune,2,train/{name},0.5\nfinetune,4,train/{name},0.4\n')
  noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  run = evaluated.read(str(path))
  pictures.save(record, run.ends(), lambda i: noise, str(directory))
  return path


@pytest.fixture(scope='module')
def reported(tmp_path_factory):
  """The folder of a run's report."""
  path = write_run(tmp_path_factory.mktemp('runs') / 'one', images(gain=0.5))
  with flagsaver.flagsaver(workdir=str(path)):
    command.run([])
  return path / 'report'


def test_a_report_is_one_page_and_what_it_is_made_of(reported):
  assert {
    'index.html',
    'report.md',
    'evaluation.csv',
    'classes.csv',
    'accuracy_cost.svg',
    'sizes.svg',
    'classes.svg',
    'routing.svg',
    'pictures',
    'record.npz',
  } == set(os.listdir(reported))
  text = (reported / 'index.html').read_text()
  assert 'Is the gain real?' in text and '<strong>Yes</strong>' in text
  assert '&lt;b&gt;cat' in text and '<b>cat' not in text
  assert text.count('<svg') == 4
  assert text.count('<img src="data:image/jpeg;base64,') >= 30
  # Identifiers of several figures on a page must differ.
  identifiers = re.findall(r' id="([^"]*)"', text)
  assert len(set(identifiers)) == len(identifiers) > 100
  for address in re.findall(r'(?:src|href)="([^"]*)"', text):
    assert address.startswith(('data:', '#')), address


def test_a_policy_is_reported_of_one_run_that_has_it(reported, tmp_path):
  path = str(reported.parent)
  # As trained it needs no calibration.
  assert evaluated.read(path, policy='router').judgement.policy.name == 'router'
  for asked in ({'policy': 'cascade'}, {'policy': 'router', 'gmacs': 1.0}):
    with pytest.raises(UserError, match='is not calibrated for its weights'):
      evaluated.read(path, **asked)
  record = record_lib.load(reported / 'record.npz')
  fixed = write_run(tmp_path, dataclasses.replace(record, log_p=None))
  with pytest.raises(UserError, match='router needs a trained predictor'):
    evaluated.read(str(fixed), policy='router')
  with flagsaver.flagsaver(workdir=f'{path},{fixed}', policy='cascade'):
    with pytest.raises(UserError, match='are for the report of one run'):
      command.run([])


def test_what_a_full_disk_cut_off_is_passed_over(tmp_path):
  path = write_run(tmp_path, images(gain=0.5))
  before = evaluated.read(str(path)).metrics
  with open(path / 'metrics.csv', 'a') as file:
    file.write('finetune,9,train/lo')
  (path / 'sessions.jsonl').write_text('{"what": "train"}\n{"what": "eva')
  after = evaluated.read(str(path))
  assert after.metrics == before
  assert after.sessions == [{'what': 'train'}]
  # Nor is the next one lost, which begins a line of its own.
  workdir.note(str(path), 'evaluate')
  assert [x['what'] for x in workdir.sessions(str(path))] == [
    'train',
    'evaluate',
  ]


@pytest.mark.parametrize('name', ['a$b_$', '_x', 'A$AP and Ke$ha', '<b>|'])
def test_names_are_drawn_and_written_as_they_are(name):
  curves = [plots.Curve(name, [1.0, 2.0], [50.0, 60.0])]
  svg = plots.latency(curves)
  assert html.escape(name, quote=False) in svg.replace('\u200b', '')
  table = page.markdown_table(page.Table([name], [['x']]))
  assert table.splitlines()[0].count('|') - table.count(r'\|') == 2


@pytest.mark.parametrize('name', ['12" record', 'a]b[', 'back\\', '"]("'])
def test_a_name_does_not_end_the_link_of_its_picture(name, tmp_path):
  picture = page.Picture('data:,', str(tmp_path / 'x.png'), name, name, True)
  section = page.Section('Examples', galleries={'right': [picture]})
  text = page.markdown(page.Page('A', '', [], [section]), str(tmp_path))
  (line,) = [x for x in text.splitlines() if x.startswith('![')]
  # As CommonMark reads it: a backslash takes the next character as it is.
  part = r'((?:\\.|[^\\%s])*)'
  form = r'!\[' + part % r'\[\]' + r'\]\(x\.png "' + part % '"' + r'"\)'
  found = re.fullmatch(form, line)
  assert found, line
  for said in found.groups():
    assert re.sub(r'\\(.)', r'\1', said) == name


def test_every_curve_is_drawn():
  """Three runtimes, two precisions, and what they are held against."""
  curves = [plots.Curve(f'curve {k}', [1, 2], [50, 60]) for k in range(10)]
  svg = plots.latency(curves)
  assert all(f'curve {k}' in svg for k in range(10))


def test_a_report_of_perfect_answers_is_drawn():
  """A mean of ones may be rounded otherwise than those of the resamples."""
  record = make_record(np.ones((60, 3)), [0, 1, 2] * 20)
  judged = judge(record, resamples=9)
  top1 = Interval(1 - 2**-52, 1 - 2**-53, 1.0)
  rounded = dataclasses.replace(judged.random, top1=top1)
  judged = dataclasses.replace(judged, random=rounded)
  assert '<svg' in plots.accuracy_cost(record, judged.fixed, judged, {})


def test_cells_are_those_of_the_record(reported):
  record = record_lib.load(reported / 'record.npz')
  routed = scores.score(router(record), record, 'router')
  with open(reported / 'evaluation.csv', newline='') as file:
    rows = {row['policy']: row for row in csv.DictReader(file)}
  assert float(rows['router']['top1']) == pytest.approx(routed.top1, abs=1e-6)
  assert float(rows['random']['gain_low']) > 0
  low, high = rows['router']['top1_low'], rows['router']['top1_high']
  cell = (
    f'{100 * routed.top1:.1f} [{100 * float(low):.1f}, {100 * float(high):.1f}]'
  )
  text = html.unescape((reported / 'index.html').read_text())
  assert f'<td>{cell}</td>' in text
  assert f'**{cell}**' in (reported / 'report.md').read_text()


@pytest.mark.skipif(not CHROMIUM, reason='there is no Chromium')
@pytest.mark.parametrize(
  'flags, paper', [([], (255, 255, 255)), (['--force-dark-mode'], (22, 24, 28))]
)
def test_a_browser_has_nothing_to_complain_of(reported, tmp_path, flags, paper):
  """It loads nothing: the page's own policy makes every attempt an error."""
  shot = tmp_path / 'page.png'
  done = subprocess.run(
    [
      CHROMIUM,
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      '--host-resolver-rules=MAP * ~NOTFOUND',
      f'--user-data-dir={tmp_path}/profile',
      '--enable-logging=stderr',
      *flags,
      '--window-size=1280,900',
      f'--screenshot={shot}',
      f'file://{reported}/index.html',
    ],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert shot.exists(), done.stderr
  with Image.open(shot) as image:
    assert image.convert('RGB').getpixel((2, 2)) == paper
  said = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
  assert not said


def test_rows_at_one_place_share_a_label():
  rows = [(1, 10.0, 70.0, None), (2, 20.0, 60.0, None), (4, 10.1, 69.9, None)]
  assert plots._groups(rows) == [([1, 4], 10.0, 70.0), ([2], 20.0, 60.0)]
  assert plots._groups(rows[:1]) == [([1], 10.0, 70.0)]


@pytest.mark.parametrize('statistics', ['batch', 'fresh', 'running'])
def test_a_size_that_nothing_chose_is_said_to_be_stale(tmp_path, statistics):
  right = [[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]]
  path = write_run(tmp_path / 'run', make_record(right, [0, 0, 1, 0]))
  config = json.loads((path / 'config.json').read_text())
  config['finetune']['objective']['statistics'] = statistics
  settings.write_json(str(path / 'config.json'), config)
  run_page.write(evaluated.read(str(path)), str(tmp_path))
  told = (
    'Hardly any image was sent to 30 px' in (tmp_path / 'report.md').read_text()
  )
  assert told == (statistics != 'fresh')


def test_a_run_without_a_router_says_so(tmp_path):
  record = make_record(choice=None)
  one = evaluated.read(str(write_run(tmp_path / 'fixed', record)))
  report = run_page.write(one, str(tmp_path / 'out'))
  first, second = report.answers
  assert 'Nothing chooses here' in first.text and first.short == '75.0 %'
  assert second.short == '+0.0 points at most'


def population(count, *, seed):
  """Images of differing difficulty, and a predictor that half knows it."""
  rng = np.random.default_rng(seed)
  ease = rng.normal(1.0, 1.0, (count, 1))
  logits = rng.normal(0, 1.0, (count, 1, 5)) + rng.normal(0, 0.7, (count, 3, 5))
  logits[:, :, 1] += 3 * ease + [-2.0, 0.0, 0.7]
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  wish = ease * [2.0, 1.0, 0.0] + rng.normal([-2.0, -0.5, 0.0], 1, (count, 3))
  log_p = wish - np.log(np.exp(wish).sum(1, keepdims=True))
  return make_record(
    probabilities=p,
    predictor_gmacs=0.1,
    log_p=log_p.astype(np.float32),
    draw=rng.random(count),
    extra={'index': np.arange(count)},
    origin='weights 1234; digits/test',
  )


@pytest.fixture(scope='module')
def calibrated(tmp_path_factory):
  """A run whose policies were found on other images."""
  path = tmp_path_factory.mktemp('calibrated') / 'one'
  write_run(path, population(600, seed=0))
  held_out = dataclasses.replace(
    population(3000, seed=1), origin='weights 1234; digits/validation'
  )
  Calibration.of(held_out, split='digits/validation').write(str(path))
  return path


def rows_of(directory, name):
  with open(directory / name, newline='') as file:
    return list(csv.DictReader(file))


def test_a_calibrated_run_is_judged_by_its_best_policy(calibrated, tmp_path):
  run = evaluated.read(str(calibrated))
  report = run_page.write(run, str(tmp_path))
  assert run.found == run.calibration.find()
  points = run.calibration.points['GMACs']
  saved = f'{100 * run.judgement.saving.value:.1f} % of the work'
  assert report.answers[0].short == saved
  rows = {row['policy']: row for row in rows_of(tmp_path, 'evaluation.csv')}
  assert {'best policy', 'router as trained'} <= set(rows)
  expected = scores.score(run.found.policy, run.record, '')
  assert float(rows['best policy']['top1']) == pytest.approx(expected.top1)
  trained = scores.score(router(run.record), run.record, '')
  assert float(rows['router as trained']['gmacs']) == pytest.approx(
    trained.gmacs
  )
  # Rivals are found on the calibration images, within the policy's cost there.
  for family in ('router', 'cascade', 'routed cascade'):
    if family in rows:
      within = [
        p
        for p in points[family.replace(' ', '_')]
        if p.gmacs <= run.found.gmacs
      ]
      rival = scores.score(within[-1].policy, run.record, '')
      assert float(rows[family]['top1']) == pytest.approx(rival.top1)
  text = (tmp_path / 'report.md').read_text()
  assert '3,000 images of digits/validation, never on these' in text


def test_every_budget_is_promised_and_checked(calibrated, tmp_path):
  run = evaluated.read(str(calibrated))
  run_page.write(run, str(tmp_path))
  rows = rows_of(tmp_path, 'budgets.csv')
  assert {row['family'] for row in rows} == {
    'best',
    'cascade',
    'fixed',
    'routed_cascade',
    'router',
  }
  promised = {
    (family, p.gmacs): p
    for family, points in run.calibration.points['GMACs'].items()
    for p in points
  }
  for row in rows:
    point = promised[row['family'], float(row['promised_gmacs'])]
    got = scores.score(point.policy, run.record, '')
    assert float(row['promised_top1']) == point.top1
    assert float(row['test_top1']) == pytest.approx(got.top1)
    assert float(row['best_fixed']) == pytest.approx(
      scores.hull_top1(run.record, got.gmacs)
    )
  best = [row for row in rows if row['family'] == 'best']
  assert len(best) == len({row['budget_gmacs'] for row in rows})
  for row in rows:
    assert float(row['promised_gmacs']) <= float(row['budget_gmacs']) * 1.001
  shown = run_page.budget_table(run).splitlines()
  different = {row['promised_gmacs'] for row in best}
  assert len(shown) == 2 + len(different) and 'promised, GMACs' in shown[0]


@pytest.mark.parametrize(
  'asked, name, family',
  [
    ({'policy': 'cascade'}, 'cascade policy', 'cascade'),
    ({'policy': 'routed_cascade'}, 'routed cascade policy', 'routed_cascade'),
    ({'gmacs': 3.0}, 'best policy', None),
    ({'policy': 'fixed', 'gmacs': 2.5}, 'fixed policy', 'fixed'),
    ({'policy': 'router'}, 'router as trained', 'router'),
  ],
)
def test_a_report_is_of_the_policy_that_is_asked_for(
  calibrated, asked, name, family
):
  run = evaluated.read(str(calibrated), **asked)
  if asked == {'policy': 'router'}:  # as trained, as `predict` understands it
    policy = router(run.record)
  else:
    point = run.calibration.find(**asked)
    assert point.gmacs <= asked.get('gmacs', np.inf)
    policy = point.policy
  assert run.policy == policy and family in (None, policy.family)
  judged = run.judgement
  got = scores.score(policy, run.record, '')
  assert judged.policy.name == name
  assert judged.policy.top1.value == pytest.approx(got.top1)
  assert judged.policy.gmacs.value == pytest.approx(got.gmacs)


def test_the_command_takes_a_policy_and_a_budget(calibrated, tmp_path):
  with flagsaver.flagsaver(
    workdir=str(calibrated),
    report_to=str(tmp_path),
    policy='cascade',
    budget_gmacs=2.5,
  ):
    command.run([])
  run = evaluated.read(str(calibrated), policy='cascade', gmacs=2.5)
  assert run.policy.family == 'cascade'
  (row,) = [
    row
    for row in rows_of(tmp_path, 'evaluation.csv')
    if row['policy'] == 'cascade policy'
  ]
  got = scores.score(run.policy, run.record, '')
  assert float(row['top1']) == pytest.approx(got.top1)


def test_what_is_asked_for_needs_a_calibration(calibrated, tmp_path):
  path = str(tmp_path / 'run')
  shutil.copytree(calibrated, path)
  with pytest.raises(UserError, match='out of reach: the least is 1,'):
    evaluated.read(path, gmacs=0.5).judgement  # noqa: B018
  # Of other weights it says nothing of these.
  record = dataclasses.replace(population(50, seed=0), origin='weights 5; x')
  record_lib.save(record, os.path.join(path, 'report', 'record.npz'))
  assert evaluated.read(path).calibration is None
  with pytest.raises(UserError, match='calibrate --workdir='):
    evaluated.read(path, policy='cascade')


def test_a_calibrated_network_with_exits_chooses(tmp_path):
  """The setting that was best on held-out images, not on these."""
  names = ('exit 1', 'exit 2', 'exit 3')

  def record(sure, origin):
    return make_record(
      choice=None,
      names=names,
      confidence=np.array(sure),
      predictor_gmacs=0.0,
      origin=f'weights 1; {origin}',
    )

  sure = [[0.9, 1, 1], [0.4, 0.9, 1], [0.1, 0.2, 1], [1, 1, 1]]
  test = record(sure, 'test')
  path = write_run(tmp_path / 'exits', test)
  # Image 1 is less sure there: the threshold of exit 1 lies over it, not
  # between it and image 0.
  held_out = record([[0.8, 1, 1], [0.3, 0.9, 1], *sure[2:]], 'validation')
  Calibration.of(held_out, split='validation').write(str(path))
  few = evaluated.read(str(path))
  assert few.policy.family == 'fixed'
  assert (
    'On 4 held-out images no saving keeps the accuracy'
    in run_page.answers(few)[-1].text
  )
  assert 'That is not time: calibrate' in run_page.answers(few)[0].text
  # What it takes in time, once that was measured.
  ms = Costs('ms', (1.0, 3.0, 4.0), 0.0, 'jax, batch 1, cpu')
  Calibration.of(held_out, split='validation', ms=ms).write(str(path))
  run = evaluated.read(str(path), gmacs=2.0)
  assert run_page.answers(run)[1] == (
    'And on the stopwatch?',
    '1.78 times as fast',
    '2.25 ms an image on average, 4 ms with all at exit 3, by the time that '
    'each exit takes (jax, batch 1, cpu).',
  )
  limit = (0.8 + 0.3) / 2
  assert run.policy.family == 'cascade' and run.router is None
  assert run.policy.stop[0] == pytest.approx(limit)
  # An exit goes on with what the one before computed: 1, 2 and 4 in all.
  assert run.ends().tolist() == [0, 1, 2, 0]
  assert run.judgement.policy.gmacs.value == pytest.approx((1 + 2 + 4 + 1) / 4)
  assert run.sizes == '3 exits' and 'router as trained' not in (
    run.judgement.others
  )
  report = run_page.write(run, str(tmp_path / 'out'))
  assert 'with all images at exit 3.' in report.answers[0].text


@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
  """The folder of a set for Tables 5 and 1, of which a row is not run."""
  path = tmp_path_factory.mktemp('set')
  base = np.array([[1, 1, 1]] * 50 + [[0, 0, 0]] * 50)
  for k, wins in enumerate((0, 10), 1):
    right = base.copy()
    right[50 : 50 + wins] = 1
    write_run(path / f'random_{k}', make_record(right, [0] * 100))
  write_run(path / 'one_size', make_record(base, None))
  rows = {
    'random 1': 'random_1',
    'random 2': 'random_2',
    'random 3': 'not_there',
    'fixed 224': 'one_size',
    'the same': 'one_size',
  }
  settings.write_json(
    str(path / 'set.json'), {'title': 'A trial', 'tables': [5, 1], 'rows': rows}
  )
  return path


def cells(runs, number):
  found = set_page.rows(runs)
  names = list(TABLES[number].rows) if number else list(runs.runs)
  table = set_page.table(number, names, found)
  return table, {row[0]: row[1:] for row in table.rows}


def test_our_runs_stand_beside_the_papers_figures(experiment):
  runs = run_set.read(str(experiment))
  table, row = cells(runs, 5)
  assert list(row) == list(TABLES[5].rows)
  assert [title for title, _ in table.groups] == [
    '',
    'the paper: ImageNet-1k, ResNet-50 at 112/168/224 px',
    'ours: scaled_digits, resnet (1 blocks, width 8)',
  ]
  assert row['random 1'][:2] == ['2.6', '74.70']
  # All at the smallest of 1, 2 and 4, with a predictor of .5.
  assert row['random 1'][2:5] == ['10/20/30 px', '1.50', '37.5']
  assert row['random 1'][5].startswith('50.0 [')
  # Not run: the paper's figures alone.
  assert row['random 3'] == ['2.6', '74.60'] + [''] * 8
  assert row['DRNet'] == ['3.7', '77.5'] + [''] * 8
  # The mean of 50 and 60 %, and the paper's of its three.
  assert row['random mean'][1] == '74.65 ± 0.04'
  assert row['random mean'][5] == '55.00 ± 5.00'
  # One run fills a row of two tables; the paper's figures are the table's.
  _, row = cells(runs, 1)
  assert row['fixed 224'][:4] == ['4.1', '78.5', '10/20/30 px', '4.00']


def test_rows_are_compared_with_the_network_of_one_size(experiment):
  rows = set_page.rows(run_set.read(str(experiment)))
  assert 'random 3' not in rows
  assert rows['random 1'].over_fixed == Interval(0.0, 0.0, 0.0)
  assert rows['random 2'].over_fixed.value == pytest.approx(0.1)
  assert rows['random 2'].over_fixed.sign == 1
  assert rows['fixed 224'].over_fixed is None
  assert rows['the same'].over_fixed is None


@pytest.fixture(scope='module')
def one_network_each(calibrated, tmp_path_factory):
  """The calibrated run's sizes again, each as a network of its own."""
  ours = evaluated.read(str(calibrated)).record
  path = tmp_path_factory.mktemp('each')
  for j, name in enumerate(ours.options.names):
    record = make_record(
      ours.top1[:, [j]],
      None,
      names=[name],
      gmacs=ours.gmacs[[j]],
      extra={'index': ours.extra['index']},
    )
    write_run(path / f'alone_{j}', record)
  return [str(path / f'alone_{j}') for j in range(3)]


def test_networks_of_one_size_are_rivals_too(
  calibrated, one_network_each, tmp_path
):
  paths = ','.join([str(calibrated), *one_network_each])
  with flagsaver.flagsaver(workdir=paths, report_to=str(tmp_path)):
    command.run([])
  run = evaluated.read(str(calibrated))
  rows = rows_of(tmp_path, 'budgets.csv')
  policies = {c.point.policy for c in run.budgets['best']}
  assert len(rows) == len(policies) > 8
  for row in rows:
    # The same answers at the same costs, so the same rival.
    for end in ('', '_low', '_high'):
      assert row[f'over_networks{end}'] == row[f'over_best_fixed{end}']
    judged = scores.judge(
      run.record,
      next(
        c.point.policy
        for c in run.budgets['best']
        if str(c.budget) == row['budget_gmacs']
      ),
      name='policy',
    )
    assert float(row['top1']) == pytest.approx(judged.policy.top1.value)
    gain = judged.best_fixed.gain
    ends = ('', '_low', '_high')
    found = [float(row[f'over_best_fixed{end}']) for end in ends]
    assert found == pytest.approx([gain.value, gain.low, gain.high], abs=1e-9)
  text = (tmp_path / 'report.md').read_text()
  assert text.count('| one | ') == 8 + 3  # in this table and in three others
  # Without such networks there is no such rival.
  twin = shutil.copytree(calibrated, tmp_path / 'twin')
  with flagsaver.flagsaver(
    workdir=f'{calibrated},{twin}', report_to=str(tmp_path)
  ):
    command.run([])
  with flagsaver.flagsaver(workdir=f'{twin},{twin}'):
    with pytest.raises(UserError, match='name each folder once'):
      command.run([])
  assert {row['over_networks'] for row in rows_of(tmp_path, 'budgets.csv')} == {
    ''
  }


def test_the_report_of_a_set(experiment):
  with flagsaver.flagsaver(workdir=str(experiment)):
    command.run([])
  directory = experiment / 'report'
  assert {'index.html', 'table5_ours.svg', 'table1_papers.svg'} <= set(
    os.listdir(directory)
  )
  with open(directory / 'runs.csv', newline='') as file:
    rows = {(row['table'], row['row']): row for row in csv.DictReader(file)}
  assert rows['5', 'random 3']['top1'] == ''
  assert rows['5', 'random 3']['paper_top1'] == '74.60'
  assert float(rows['5', 'random 2']['top1']) == pytest.approx(0.6)
  assert rows['', 'the same']['paper_top1'] == ''
  text = (directory / 'report.md').read_text()
  assert '4 of 5 rows run. scaled_digits' in text
  assert text.index("paper's Table 5") < text.index("paper's Table 1")


def test_a_set_that_has_only_begun_has_a_report(tmp_path):
  settings.write_json(
    str(tmp_path / 'set.json'),
    {'title': 'Begun', 'tables': [6], 'rows': {'DRNet': 'not_there'}},
  )
  with flagsaver.flagsaver(workdir=str(tmp_path)):
    command.run([])
  text = (tmp_path / 'report' / 'report.md').read_text()
  assert '0 of 1 rows run.' in text and 'Nothing yet' in text
  assert '| DRNet | 0.283 | 72.7 | 3.8 |  |' in text


def test_several_runs_are_named_after_their_folders(experiment, tmp_path):
  paths = f'{experiment}/random_1,{experiment}/random_2'
  with flagsaver.flagsaver(workdir=paths, report_to=str(tmp_path)):
    command.run([])
  text = (tmp_path / 'report.md').read_text()
  assert '| random_2 |' in text and 'the paper:' not in text


def test_what_cannot_be_reported_is_named(experiment, tmp_path):
  with pytest.raises(UserError, match='not a workdir of drnet_jax'):
    evaluated.read(str(tmp_path))
  path = tmp_path / 'begun'
  path.mkdir()
  shutil.copy(experiment / 'one_size' / 'config.json', path)
  with pytest.raises(UserError, match='not evaluated yet: .*--mode=evaluate'):
    evaluated.read(str(path))
  for fields, message in (
    ({'title': '', 'tables': [7], 'rows': {}}, 'table 7 is not one of'),
    ({'title': ''}, 'is damaged'),
    ({'title': '', 'tables': 5, 'rows': {}}, 'is damaged'),
  ):
    (path / 'set.json').write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
      run_set.read(str(path))


def test_the_papers_own_mean_is_as_we_compute_it():
  draws = [float(TABLES[5].rows[f'random {k}'].top1) for k in (1, 2, 3)]
  assert TABLES[5].rows['random mean'].top1 == (
    f'{np.mean(draws):.2f} ± {np.std(draws):.2f}'
  )
