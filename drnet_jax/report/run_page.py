# SPDX-License-Identifier: Apache-2.0
"""The report of one run."""

import os
import shlex
from collections.abc import Sequence
from typing import Any

from flax import traverse_util

from drnet_jax import settings, tables, terminal
from drnet_jax.choosing import scores
from drnet_jax.choosing.options import Costs
from drnet_jax.choosing.policy import decide, describe, fixed
from drnet_jax.choosing.record import Record
from drnet_jax.choosing.scores import ClassEffect, Score
from drnet_jax.report import latencies, page, pictures, plots, wording
from drnet_jax.report.evaluated import EvaluatedRun, how_to_calibrate
from drnet_jax.report.page import Page, Picture, Section, Table
from drnet_jax.report.wording import Answer, percent, percent_interval
from drnet_jax.run import ladder

_MOST_CLASSES = 20  # in the table of the page; all are in the csv
_RARE = 0.01  # of the images at a size

_RIVALS = (
  'All use the same weights and test images. Best fixed: one {noun} for all '
  'images, or a mixture of two, at the cost of the {name}. Random: {noun}s '
  'drawn blindly, at that cost. {others}Oracle: the cheapest correct {noun}, '
  'which needs the label. Brackets: 95 % bootstrap intervals over the test '
  'images (over the originals, where several images were made from one); gains '
  'are paired, image by image. They do not cover the variation between '
  'training runs.'
)
_CALIBRATED = (
  'Other policies: the best of each family within that cost, found on '
  '{images:,} images of {split}, never on these; the router as trained may '
  'cost more. '
)
_UNCALIBRATED = (
  'Cascade: the smallest size first, a larger one while unsure, each of them '
  'paid for; its thresholds were set on these images, which favours it. '
)

_UNSURE = (
  ' On {:,} held-out images no saving keeps the accuracy for sure. Set a '
  'budget, hold out more images (config.data.held_out), or name others '
  '(calibrate --split).'
)
_NOT_MEASURED = (
  ' That is not time: calibrate --measure=auto times each {} on this machine.'
)
_STALE = (
  ' Hardly any image was sent to {sizes}, so the batch statistics there are '
  'stale, and a fixed size scores less than its weights could. '
  "Training with objective.statistics='fresh' avoids that."
)


def write(run: EvaluatedRun, directory: str) -> Page:
  """Writes the report of a run.

  That is `index.html`, which needs no other file, `report.md`,
  `evaluation.csv`, `classes.csv`, `budgets.csv` and the figures as svg.
  """
  record, judged = run.record, run.judgement
  effects = judged and scores.by_class(record, run.policy, run.class_names)
  bad = run.evaluation.get('unreadable', 0)
  unreadable = f'; {bad} more could not be read and are left out' if bad else ''
  when = ''
  if made := run.session:
    when = (
      f'Evaluated {made["time"][:10]} at commit {made["commit"]} on '
      f'{made["device"]}.'
    )
  sections = [
    _accuracy(run),
    run.budgets and _budgets(run),
    _sizes(run),
    judged and _classes(effects, record, judged.policy.name),
    run.routing and _training(run),
    _latency(run),
    _made_with(run),
    _config(run),
  ]
  figure = plots.accuracy_cost(record, run.fixed, judged, _curves(run))
  report = Page(
    title=f'{run.name}: {run.network} at {run.sizes}',
    subtitle=(
      f'{run.data}, split {run.config.data.test_split}: '
      f'{len(record.label):,} images{unreadable}. {when}'
    ),
    answers=answers(run),
    sections=[section for section in sections if section],
    figures={'accuracy_cost': figure},
    csv={
      'evaluation': _policies_csv(run),
      'classes': effects and _classes_csv(effects),
      'budgets': _budgets_csv(run),
    },
  )
  return page.write(report, directory)


def answers(run: EvaluatedRun) -> list[Answer]:
  """What a reader asks first, and the answers."""
  if not run.judgement:
    return _without_choice(run)
  saved, *found, how = wording.answers(run.judgement, run.record, run.policy)
  full = fixed(int(run.record.gmacs.argmax()))
  if run.calibration and run.policy == full and not run.asked:
    how = how._replace(text=how.text + _UNSURE.format(run.calibration.images))
  ms = run.calibration and run.calibration.costs.get('ms')
  if ms:
    return [saved, _stopwatch(run, ms), *found, how]
  text = saved.text + _NOT_MEASURED.format(run.record.options.noun)
  return [saved._replace(text=text), *found, how]


def _stopwatch(run: EvaluatedRun, ms: Costs) -> Answer:
  """What the policy takes by the times of its options."""
  mean = float(decide(run.policy, run.record, ms).cost.mean())
  full, options = int(run.record.gmacs.argmax()), run.record.options
  return Answer(
    'And on the stopwatch?',
    f'{ms.options[full] / mean:.2f} times as fast',
    f'{mean:.3g} ms an image on average, {ms.options[full]:.3g} ms with all at '
    f'{options.names[full]}, by the time that each {options.noun} takes '
    f'({ms.source}).',
  )


def size_galleries(run: EvaluatedRun) -> dict[str, dict[str, list[Picture]]]:
  """Pictures in rows by where they end, and by the cheapest correct option.

  Under each is what the network says at the size of the row; in the last row,
  of those that no size gets right, at the largest.
  """
  record = run.record
  classes = [name.partition(',')[0] for name in run.class_names]

  def picture(i: int, option: int) -> Picture:
    predicted = classes[record.predicted[i, option]]
    return Picture(
      address=run.pictures[i],
      path=os.path.join(run.directory, pictures.path(i)),
      label=f'{predicted} {record.confidence[i, option]:.2f}',
      truth=classes[record.label[i]],
      right=bool(record.top1[i, option]),
    )

  found = {}
  for name, (group, rows) in pictures.shown(record, run.ends()).items():
    found[name] = {}
    for k, title in enumerate([*record.options.names, 'none']):
      option = min(k, len(record.options) - 1)
      # Of another policy than at evaluation others were saved.
      there = [i for i in rows[k].tolist() if i in run.pictures]
      row = [picture(i, option) for i in there[: pictures.COLUMNS]]
      if row:
        share = percent((group == k).mean())
        found[name][f'{title}, {share} % of the images'] = row
  return found


def _without_choice(run: EvaluatedRun) -> list[Answer]:
  record = run.record
  best = max(run.fixed, key=lambda scored: scored.top1.value)
  several = len(run.fixed) > 1
  advice = f' To find policies: {how_to_calibrate(run.path)}' if several else ''
  shows = Answer(
    'What does this run show?',
    f'{percent(best.top1.value)} %',
    f'Nothing chooses here: all images get the same option. The best is '
    f'{best.name} with {percent_interval(best.top1)} % top-1 at '
    f'{wording.cost(best.gmacs.value, record)} an image.{advice}',
  )
  if not several:
    return [shows]
  bound = scores.oracle(record)
  gains = Answer(
    'What could choosing gain?',
    f'{100 * (bound.top1 - best.top1.value):+.1f} points at most',
    f'The cheapest correct option for each image has {percent(bound.top1)} % '
    f'at {wording.cost(bound.gmacs, record)}. It needs the labels, so it is a '
    'bound, not a result.',
  )
  return [shows, gains]


def _curves(run: EvaluatedRun) -> dict[str, list[Score]]:
  """Each family over its budgets; not twice where one alone is the best."""
  curves, drawn = {}, []
  for family, budgets in sorted(run.budgets.items()):
    points = [checked.got for checked in budgets]
    places = [(p.gmacs, p.top1) for p in points]
    if family == 'fixed' or len(points) < 2 or places in drawn:
      continue
    drawn.append(places)
    name = 'best at each cost' if family == 'best' else family.replace('_', ' ')
    curves[name] = points
  return curves


def _accuracy(run: EvaluatedRun) -> Section:
  record, judged = run.record, run.judgement
  scored, note = run.fixed, ''
  if judged:
    scored, noun = judged.all, record.options.noun
    others = _UNCALIBRATED if judged.others else ''
    if run.calibration:
      others = _CALIBRATED.format(
        images=run.calibration.images, split=run.calibration.split
      )
    note = _RIVALS.format(noun=noun, name=judged.policy.name, others=others)
    note += _stale(run)
  scale, unit = wording.unit(record)
  rows, ends = [], []
  for s in scored:
    at_that_cost = judged and s in (judged.best_fixed, judged.random)
    # What matters most to the left: a phone shows no more.
    row = {
      '': f'{s.name}, at that cost' if at_that_cost else s.name,
      unit: wording.three_digits(scale * s.gmacs.value),
      'top-1, %': percent_interval(s.top1),
    }
    if judged:
      gain = '' if s is judged.policy else wording.points(s.gain)
      row[f'{judged.policy.name} gains, points'] = gain
    row['% of full'] = percent(s.gmacs.value / record.costs.full)
    row['top-5, %'] = percent(s.top5)
    rows.append(row)
    shares = zip(record.options.names, s.shares, strict=True)
    ends.append({f'{name}, %': percent(share) for name, share in shares})
  timed = shlex.join(['benchmark', f'--workdir={run.path}'])
  if run.first != run.path:  # a ladder
    timed = shlex.join(['compare', f'--workdirs={run.path}', '--folder=times'])
  return Section(
    title='Accuracy and cost',
    text=[
      'Cost is in multiply-adds (GMACs: 1e9, MMACs: 1e6), not in time: `python '
      f'-m drnet_jax {timed}` measures how much of the saving shows on this '
      'machine.'
    ],
    table=Table.grouped(
      {'': rows, 'images that end at': ends},
      strong=[scored.index(judged.policy)] if judged else [],
      note=note,
    ),
  )


def _policies_csv(run: EvaluatedRun) -> list[dict[str, Any]]:
  rows = []
  for s in run.judgement.all if run.judgement else run.fixed:
    row = {'policy': s.name}
    for name in ('gmacs', 'top1', 'gain'):
      row |= tables.interval(name, getattr(s, name))
    row['top5'] = s.top5
    for option, share in zip(run.record.options.names, s.shares, strict=True):
      row[f'share of {option}'] = share
    rows.append(row)
  return rows


def _stale(run: EvaluatedRun) -> str:
  """A word of caution about fixed sizes that are not what they could be."""
  judged = run.router_judgement
  stages = [run.config[name].objective for name in run.config.stages]
  kept_up = any(o.get('statistics') == 'fresh' for o in stages)
  private = run.config.model.get('resolution_aware_bn', False)
  if judged is None or kept_up or not private:
    return ''
  names = [
    run.record.options.names[j]
    for j in run.router.path
    if judged.policy.shares[j] < _RARE
  ]
  return _STALE.format(sizes=' and '.join(names)) if names else ''


def budget_table(run: EvaluatedRun) -> str:
  """The best policy for each budget, promised and checked, as text."""
  return terminal.table(_budget_rows(run))


def _budget_rows(run: EvaluatedRun) -> list[dict[str, str]]:
  scale, unit = wording.unit(run.record)
  different = {c.point.gmacs: c for c in run.budgets['best']}
  return [
    {
      f'promised, {unit}': wording.three_digits(scale * point.gmacs),
      'test': wording.three_digits(scale * got.gmacs),
      'promised, %': percent(point.top1),
      'test, %': percent(got.top1),
      'best fixed there, %': percent(scores.hull_top1(run.record, got.gmacs)),
      'policy': describe(point.policy, run.record.options),
    }
    for _, point, got in different.values()
  ]


def _budgets(run: EvaluatedRun) -> Section:
  return Section(
    title='Any budget',
    text=[
      'The best policy for each average cost, found on '
      f'{run.calibration.images:,} images of {run.calibration.split}, and its '
      'cost and accuracy on the test images. `--budget_gmacs` and the slider '
      'of the demo choose in the same way.'
    ],
    table=Table.of(_budget_rows(run), note='All families are in budgets.csv.'),
    folded=True,
  )


def _budgets_csv(run: EvaluatedRun) -> list[dict[str, Any]]:
  return [
    {
      'family': family,
      'budget_gmacs': budget,
      'promised_gmacs': point.gmacs,
      'promised_top1': point.top1,
      'test_gmacs': got.gmacs,
      'test_top1': got.top1,
      'test_top5': got.top5,
      'best_fixed': scores.hull_top1(run.record, got.gmacs),
      'policy': describe(point.policy, run.record.options),
    }
    for family, checked in run.budgets.items()
    for budget, point, got in checked
  ]


def _sizes(run: EvaluatedRun) -> Section:
  noun, ends = run.record.options.noun, run.ends()
  galleries = size_galleries(run)
  shown = {}
  for name, title in (('ends', 'ends at'), ('needed', 'cheapest correct')):
    for option, row in galleries.get(name, {}).items():
      shown[f'{title}: {option}'] = row
  text = [
    f"Rank correlation (Spearman's rho) of where an image ends with `{name}` "
    f'of the data set: {rho:+.2f}.'
    for name, rho in run.rank_correlations().items()
  ]
  if run.pictures:
    text.append(
      f'Under a picture: what the network says at the {noun} of its row (the '
      'last, where none is right), how likely that is, and after an ✗ what it '
      'should have said.'
    )
  elif not ladder.is_ladder(run.path):
    text.append(
      'There are no pictures yet: `python -m drnet_jax.main --mode=evaluate '
      f'--workdir={run.path}` adds them.'
    )
  return Section(
    title=f'Which {noun} does an image get, and which does it need?',
    text=text,
    figures={'sizes': plots.sizes(run.record, ends)},
    galleries=shown,
  )


def _classes(
  effects: Sequence[ClassEffect], record: Record, name: str
) -> Section:
  shown, note = list(effects), ''
  if len(shown) > _MOST_CLASSES:
    half = _MOST_CLASSES // 2
    shown = [*shown[:half], *shown[-half:]]
    note = (
      f'{len(shown)} of {len(effects)} classes: the most harmed and the most '
      'helped. All are in classes.csv.'
    )
  rows = [
    {
      'class': e.name.partition(',')[0],
      'images': str(e.images),
      f'full {record.options.noun}, %': percent(e.full),
      'change, points': wording.points(e.change),
      'cost, % of full': percent(e.gmacs / record.costs.full),
    }
    for e in shown
  ]
  harmed = sum(e.change.sign < 0 for e in effects)
  helped = sum(e.change.sign > 0 for e in effects)
  return Section(
    title='Effect per class',
    text=[
      f'Top-1 of each class, {name} against all images at the full '
      f'{record.options.noun}: {harmed} of {len(effects)} classes lose and '
      f'{helped} gain beyond their 95 % interval. By chance alone, one class '
      'in twenty would.'
    ],
    figures={'classes': plots.classes(effects, record)},
    table=Table.of(rows, note=note),
  )


def _classes_csv(effects: Sequence[ClassEffect]) -> list[dict[str, Any]]:
  return [
    {'class': e.name, 'images': e.images, 'full_top1': e.full}
    | tables.interval('change', e.change)
    | {'gmacs': e.gmacs}
    for e in effects
  ]


def _training(run: EvaluatedRun) -> Section:
  return Section(
    title='Routing over training',
    text=[
      'Shares of the sizes; entropy of the choice (dotted: all sizes equally '
      'likely); hinge loss, by how far the average cost exceeds its target, '
      'as a share of the range from the cheapest to the most expensive size.'
    ],
    figures={
      'routing': plots.routing(run.routing, list(run.record.options.names))
    },
  )


def _latency(run: EvaluatedRun) -> Section | None:
  """Figure 3 in milliseconds, where the benchmark has measured them."""
  curves = latencies.of(run)
  if not curves:
    return None
  return Section(
    title='Accuracy and latency',
    text=[
      'Measured by `python -m drnet_jax benchmark`, one image at a time; '
      "routed: the predictor's time and the sizes' in their shares."
    ],
    figures={'accuracy_latency': plots.latency(curves)},
  )


def _made_with(run: EvaluatedRun) -> Section:
  rows = [
    ['workdir', run.path],
    ['weights', run.evaluation.get('origin', run.record.origin)],
  ]
  if 'parameters' in run.evaluation:
    rows.append(['parameters', f'{run.evaluation["parameters"]:,}'])
  if not run.sessions and not ladder.is_ladder(run.path):
    rows.append(['commit, device, dates', 'not recorded by this version'])
  for session in (*run.sessions[:1], *run.sessions[1:][-1:]):  # first and last
    made = '; '.join(session[k] for k in ('commit', 'device', 'versions'))
    rows += [
      [f'{session["what"]}, started', session['time']],
      ['command', session['command']],
      ['commit, device', made],
    ]
  if len(run.sessions) > 2:
    rows.append(['sessions', f'{len(run.sessions)}; all in sessions.jsonl'])
  return Section(
    title='What made these numbers',
    table=Table(['what', 'value'], rows),
    folded=True,
  )


def _config(run: EvaluatedRun) -> Section:
  fields = traverse_util.flatten_dict(settings.plain(run.config), sep='.')
  return Section(
    title='Config',
    table=Table(
      ['field', 'value'], [[name, repr(x)] for name, x in fields.items()]
    ),
    folded=True,
  )
