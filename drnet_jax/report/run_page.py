# SPDX-License-Identifier: Apache-2.0
"""The report of one run."""

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drnet_jax import settings
from drnet_jax.report import (
  choices,
  compare,
  page,
  pictures,
  plots,
  policies,
  wording,
)
from drnet_jax.report.compare import ClassEffect, Comparison, Scored
from drnet_jax.report.page import Page, Picture, Section, Table
from drnet_jax.report.policies import Record
from drnet_jax.report.run import Run
from drnet_jax.report.wording import Answer, percent, percent_interval

_MOST_CLASSES = 20  # in the table of the page; all are in the csv

_RIVALS = (
  'All on the same weights and test images. Best fixed: one {noun} for all, or '
  "a mixture of two, at the router's cost and without a predictor. Random: "
  '{noun}s drawn blindly, at that cost. {cascade}Oracle: the cheapest {noun} '
  'that is right, which needs the label. Brackets: 95 % bootstrap intervals '
  'over the test images, of gains over the same images; they say nothing of '
  'another training run.'
)
_CASCADE = (
  'Cascade: the smallest size first, the next while the confidence is under a '
  'threshold, all of them paid for, at that cost; its thresholds are taken '
  'from these images, which favours it. '
)

_STALE = (
  ' Hardly an image was sent to {sizes}, where the statistics of the norms are '
  'therefore old: alone, and where random picks it, such a size scores less '
  "than its weights could. Training with objective.statistics='fresh' keeps "
  'them up.'
)


def write(run: Run, directory: str) -> Page:
  """Writes the report of a run.

  That is `index.html`, which needs no other file, `report.md`,
  `evaluation.csv`, `classes.csv` and the figures as svg.
  """
  record = choices.chosen(run)
  found = choices.comparison(run)
  fixed = found.fixed if found else compare.fixed_sizes(record)
  effects = found and compare.by_class(record, run.class_names)
  report = _page(run, record, found, fixed, effects)
  page.write(report, directory)
  _write_csv(directory, 'evaluation', _policy_rows(record, found, fixed))
  if effects:
    rows = [_class_row(effect) for effect in effects]
    _write_csv(directory, 'classes', rows)
  return report


def size_galleries(run: Run) -> dict[str, dict[str, list[Picture]]]:
  """Pictures in rows by chosen, and by smallest sufficient size."""
  record = run.record
  found = {}
  if record.log_p is not None:
    found['chosen'] = _gallery(
      run, pictures.by_choice(record), record.choice, record.options
    )
  found['needed'] = _gallery(
    run,
    pictures.by_smallest_sufficient(record),
    policies.smallest_sufficient(record),
    [*record.options, 'none'],
  )
  return found


def _page(
  run: Run,
  record: Record,
  found: Comparison | None,
  fixed: Sequence[Scored],
  effects: Sequence[ClassEffect] | None,
) -> Page:
  sections = [
    _accuracy(run, record, found, fixed),
    _sizes(run, record),
    found and _classes(effects, record, found.router.name),
    run.routing and _training(run),
    _latency(run),
    _made_with(run),
    _config(run),
  ]
  answers = (
    wording.answers(found, record) if found else _without_router(run, fixed)
  )
  return Page(
    title=f'{run.name}: {run.network} at {run.sizes}',
    subtitle=(
      f'{run.data}, split {run.config.data.test_split}: '
      f'{len(record.label):,} images{_unreadable(run)}. {_when(run)}'
    ),
    answers=answers,
    sections=[section for section in sections if section],
  )


def _unreadable(run: Run) -> str:
  bad = run.evaluation.get('unreadable', 0)
  return f'; {bad} more cannot be read and are left out' if bad else ''


def _when(run: Run) -> str:
  done = [s for s in run.sessions if s['what'] == 'evaluate']
  if not done:
    return ''
  last = done[-1]
  return (
    f'Evaluated {last["time"][:10]} at commit {last["commit"]} on '
    f'{last["device"]}.'
  )


def _without_router(run: Run, fixed: Sequence[Scored]) -> list[Answer]:
  record = run.record
  advice = (
    f' Thresholds are set by python -m drnet_jax calibrate --workdir={run.path}'
    if record.noun == 'exit'
    else ''
  )
  best = max(fixed, key=lambda scored: scored.top1.value)
  found = [
    Answer(
      'What does this run show?',
      f'{percent(best.top1.value)} %',
      f'Nothing chooses here: every image runs alike. Best is {best.name} with '
      f'{percent_interval(best.top1)} % top-1 at '
      f'{wording.cost(best.gmacs.value, record)} an image.{advice}',
    )
  ]
  if len(fixed) > 1:
    bound = policies.oracle(record)
    found.append(
      Answer(
        'What could choosing gain?',
        f'{100 * (bound.top1 - best.top1.value):+.1f} points at most',
        f'The cheapest that is right for each image has {percent(bound.top1)} '
        f'% at {wording.cost(bound.gmacs, record)}. It needs the labels: a '
        'bound, not a result.',
      )
    )
  return found


def _accuracy(run, record, found, fixed) -> Section:
  curves = {}
  if found and found.cascade:
    curves['confidence cascade'] = policies.cascade_curve(record)
  budgets = choices.budget_curve(run)
  if budgets:
    curves[budgets[0].name] = budgets
  return Section(
    title='Accuracy and cost',
    text=[
      'Cost is in multiply-adds (GMACs: 1e9 of them, MMACs: 1e6), which are '
      'not time: what a machine makes of the saving is measured by `python -m '
      f'drnet_jax benchmark --workdir={run.path}`.'
    ],
    figures={
      'accuracy_cost': plots.accuracy_cost(record, fixed, found, curves)
    },
    tables=[_policy_table(run, record, found, fixed)],
  )


def _policy_table(run, record, found, fixed) -> Table:
  scored, note = fixed, ''
  if found:
    scored = found.all
    cascade = _CASCADE if found.cascade else ''
    note = _RIVALS.format(noun=record.noun, cascade=cascade)
    note += _stale(run, record, found)
  scale, unit = plots.unit(record)
  full = record.gmacs.max()
  # What matters most to the left: a phone shows no more.
  header = ['', unit, 'top-1, %']
  if found:
    header.append(f'{found.router.name} gains, points')
  header += ['% of full', 'top-5, %']
  at_that_cost = found and (found.best_fixed, found.random, found.cascade)
  rows = []
  for s in scored:
    row = [
      f'{s.name}, at that cost' if found and s in at_that_cost else s.name,
      wording.figures(scale * s.gmacs.value),
      percent_interval(s.top1),
    ]
    if found:
      row.append('' if s is found.router else wording.points(s.gain))
    row += [percent(s.gmacs.value / full), percent(s.top5)]
    rows.append(row + [percent(share) for share in s.shares])
  options = [f'{option}, %' for option in record.options]
  return Table(
    header=header + options,
    groups=[('', len(header)), ('images at', len(options))],
    rows=rows,
    strong=[scored.index(found.router)] if found else [],
    note=note,
  )


def _stale(run: Run, record: Record, found: Comparison) -> str:
  """A word of caution about fixed sizes that are not what they could be."""
  stages = [run.config[name].objective for name in run.config.stages]
  kept_up = any(o.get('statistics') == 'fresh' for o in stages)
  private = run.config.model.get('resolution_aware_bn', False)
  if not found.rare.size or kept_up or not private:
    return ''
  sizes = ' and '.join(record.options[j] for j in found.rare)
  return _STALE.format(sizes=sizes)


def _sizes(run: Run, record: Record) -> Section:
  choice = record.choice if record.log_p is not None else None
  galleries = size_galleries(run)
  shown = {}
  for name, title in (
    ('chosen', 'chosen'),
    ('needed', 'the smallest that is right'),
  ):
    for option, row in galleries.get(name, {}).items():
      shown[f'{title}: {option}'] = row
  text = [
    f"Rank correlation (Spearman's rho) of the chosen {record.noun} with "
    f'`{name}` of the data set: {rho:+.2f}.'
    for name, rho in policies.rank_correlations(record).items()
  ]
  if run.pictures:
    text.append(
      f'Under a picture: what the network says at the {record.noun} of its row '
      '(the largest, where none is right), how likely that is, and after an ✗ '
      'what it should have said.'
    )
  else:
    text.append(
      'There are no pictures: `python -m drnet_jax.main --mode=evaluate '
      f'--workdir={run.path}` takes them.'
    )
  return Section(
    title=f'Which {record.noun} does an image get, and which does it need?',
    text=text,
    figures={'sizes': plots.sizes(record, choice)},
    galleries=shown,
  )


def _gallery(
  run: Run,
  rows: Sequence[np.ndarray],
  group: np.ndarray,
  titles: Sequence[str],
) -> dict[str, list[Picture]]:
  """Rows of pictures with what the network says at the size of the row.

  In the last row of those that no size gets right it is the largest.
  """
  record = run.record
  found = {}
  for k, (title, shown) in enumerate(zip(titles, rows, strict=True)):
    j = min(k, len(record.options) - 1)
    row = [
      Picture(
        address=run.pictures[i],
        path=pictures.path(i),
        label=f'{_class_name(run, record.predicted[i, j])} '
        f'{record.confidence[i, j]:.2f}',
        truth=_class_name(run, record.label[i]),
        right=bool(record.top1[i, j]),
      )
      for i in shown
      if i in run.pictures
    ]
    if row:
      found[f'{title}, {percent((group == k).mean())} % of the images'] = row
  return found


def _class_name(run: Run, label: int) -> str:
  return run.class_names[label].partition(',')[0]


def _classes(
  effects: Sequence[ClassEffect], record: Record, name: str
) -> Section:
  full = record.gmacs.max()
  shown = list(effects)
  if len(shown) > _MOST_CLASSES:
    half = _MOST_CLASSES // 2
    shown = [*shown[:half], *shown[-half:]]
  rows = [
    [
      e.name.partition(',')[0],
      str(e.images),
      percent(e.full),
      wording.points(e.change),
      percent(e.gmacs / full),
    ]
    for e in shown
  ]
  harmed = sum(e.change.sign < 0 for e in effects)
  helped = sum(e.change.sign > 0 for e in effects)
  return Section(
    title='Who pays for the saving?',
    text=[
      f'Top-1 of each class, {name} against all images at the full '
      f'{record.noun}: {harmed} of {len(effects)} classes lose and {helped} '
      'gain beyond their 95 % interval. By chance alone, of twenty classes one '
      'would.'
    ],
    figures={'classes': plots.classes(effects, record)},
    tables=[
      Table(
        header=[
          'class',
          'images',
          f'full {record.noun}, %',
          'change, points',
          'cost, % of full',
        ],
        rows=rows,
        note=f'{len(shown)} of {len(effects)} classes: the most harmed and the '
        'most helped. All are in classes.csv.'
        if len(shown) < len(effects)
        else '',
      )
    ],
  )


def _training(run: Run) -> Section:
  return Section(
    title='Routing over training',
    text=[
      'Shares of the sizes; entropy of the choice (dotted: all sizes equally '
      'likely); hinge loss, by how much the average cost lies over its target, '
      'as a share of the range from the cheapest to the dearest size.'
    ],
    figures={'routing': plots.routing(run.routing, list(run.record.options))},
  )


def _latency(run: Run) -> Section | None:
  """Figure 3 in milliseconds, where the benchmark has measured them."""
  curves = choices.latencies(run)
  if not curves:
    return None
  return Section(
    title='Accuracy and latency',
    text=[
      'Measured by drnet_jax benchmark, one image at a time; routed: '
      "the predictor's time and the sizes' in their shares."
    ],
    figures={'accuracy_latency': plots.latency(curves)},
  )


def _made_with(run: Run) -> Section:
  rows = [
    ['workdir', run.path],
    ['weights', run.evaluation.get('origin', 'not recorded')],
  ]
  if 'parameters' in run.evaluation:
    rows.append(['parameters', f'{run.evaluation["parameters"]:,}'])
  if not run.sessions:
    rows.append(['commit, device, dates', 'not recorded by this version'])
  for session in _first_and_last(run.sessions):
    rows += [
      [f'{session["what"]}, begun', session['time']],
      ['command', session['command']],
      [
        'commit, device',
        f'{session["commit"]}; {session["device"]}; {session["versions"]}',
      ],
    ]
  if len(run.sessions) > 2:
    rows.append(['sessions', f'{len(run.sessions)}; all in sessions.jsonl'])
  return Section(
    title='What made these numbers',
    tables=[Table(header=['what', 'value'], rows=rows)],
    folded=True,
  )


def _first_and_last(sessions: Sequence[Mapping]) -> list[Mapping]:
  return list(sessions) if len(sessions) < 3 else [sessions[0], sessions[-1]]


def _config(run: Run) -> Section:
  fields = _flat(settings.plain(run.config))
  return Section(
    title='Config',
    tables=[
      Table(
        header=['field', 'value'],
        rows=[[name, repr(value)] for name, value in fields.items()],
      )
    ],
    folded=True,
  )


def _flat(section: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  found = {}
  for name, value in section.items():
    if isinstance(value, Mapping):
      found |= _flat(value, f'{prefix}{name}.')
    else:
      found[prefix + name] = value
  return found


def _policy_rows(record, found, fixed) -> list[dict[str, Any]]:
  """What `evaluation.csv` holds."""
  rows = []
  for s in found.all if found else fixed:
    row = {'policy': s.name}
    for name in ('gmacs', 'top1', 'gain'):
      value = getattr(s, name)
      row |= {
        name: value.value,
        f'{name}_low': value.low,
        f'{name}_high': value.high,
      }
    row['top5'] = s.top5
    for option, share in zip(record.options, s.shares, strict=True):
      row[f'share of {option}'] = share
    rows.append(row)
  return rows


def _class_row(effect: ClassEffect) -> dict[str, Any]:
  return {
    'class': effect.name,
    'images': effect.images,
    'full_top1': effect.full,
    'change': effect.change.value,
    'change_low': effect.change.low,
    'change_high': effect.change.high,
    'gmacs': effect.gmacs,
  }


def _write_csv(directory: str, name: str, rows: list[dict[str, Any]]) -> None:
  with open(
    os.path.join(directory, f'{name}.csv'), 'w', newline='', encoding='utf-8'
  ) as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
