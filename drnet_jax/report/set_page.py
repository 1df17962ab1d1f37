# SPDX-License-Identifier: Apache-2.0
"""The report of several runs: a table of the paper's, or one of their own."""

import csv
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from drnet_jax.report import compare, page, plots, policies, run_page, wording
from drnet_jax.report.compare import Comparison, Interval, Scored
from drnet_jax.report.page import Page, Section, Table
from drnet_jax.report.paper_tables import PaperRow
from drnet_jax.report.run import Run
from drnet_jax.report.run_set import RunSet
from drnet_jax.report.wording import Answer, percent, percent_interval

_PAPERS = {
  'gmacs': 'GMACs',
  'top1': 'top-1, %',
  'top5': 'top-5, %',
  'parameters': 'parameters, M',
}
_MEAN = 'random mean'  # of Table 5, computed from the rows 'random ...'


@dataclasses.dataclass(frozen=True)
class Row:
  """One run of a set, and what the paper has for it.

  Attributes:
    name: of the row.
    paper: the paper's figures; None if it has no such row.
    run: ours; None where it is not evaluated yet.
    scored: its router, or its largest size if it has none.
    found: the router among its rivals.
    over_fixed: its top-1 less that of the set's fixed network, on the same
      images; None if it is that network, or if there is none.
  """

  name: str
  paper: PaperRow | None
  run: Run | None = None
  scored: Scored | None = None
  found: Comparison | None = None
  over_fixed: Interval | None = None


def rows(runs: RunSet) -> list[Row]:
  """All rows of the paper's table, then those that only we have."""
  papers = runs.table.rows if runs.table else {}
  names = [*papers, *(name for name in runs.runs if name not in papers)]
  found = []
  for name in names:
    run = runs.runs.get(name)
    row = Row(name, papers.get(name), run)
    if run:
      router = run_page.comparison(run)
      dearest = run.record.gmacs.argmax()
      scored = (
        router.router if router else compare.fixed_sizes(run.record)[dearest]
      )
      row = dataclasses.replace(row, scored=scored, found=router)
    found.append(row)
  return _over_fixed(found)


def _over_fixed(found: list[Row]) -> list[Row]:
  """Compares every row with the dearest one that has no router."""
  fixed = [row for row in found if row.run and not row.found]
  if not fixed:
    return found
  base = max(fixed, key=lambda row: row.scored.gmacs.value)
  return [
    dataclasses.replace(row, over_fixed=_paired(row.run, base.run))
    if row.run and row is not base
    else row
    for row in found
  ]


def _paired(ours: Run, theirs: Run) -> Interval | None:
  """None where they were not tested on the same images."""
  ours, theirs = run_page.chosen(ours), run_page.chosen(theirs)
  same = np.array_equal(ours.label, theirs.label) and np.array_equal(
    ours.extra.get('index'), theirs.extra.get('index')
  )
  if not same:
    return None
  return compare.difference(_right(ours), _right(theirs))


def _right(record: policies.Record) -> np.ndarray:
  """Whether each image is classified correctly as the run is scored."""
  if record.log_p is None:
    return record.top1[:, record.gmacs.argmax()].astype(float)
  choice = record.choice
  return record.top1[np.arange(len(choice)), choice].astype(float)


def write(runs: RunSet, directory: str) -> Page:
  """Writes the report of several runs.

  That is `index.html`, which needs no other file, `report.md`, `runs.csv` and
  the figures as svg.
  """
  found = rows(runs)
  report = _page(runs, found)
  page.write(report, directory)
  with open(
    os.path.join(directory, 'runs.csv'), 'w', newline='', encoding='utf-8'
  ) as file:
    lines = [_csv_row(row) for row in found]
    writer = csv.DictWriter(file, lines[0])
    writer.writeheader()
    writer.writerows(lines)
  return report


def _page(runs: RunSet, found: Sequence[Row]) -> Page:
  done = [row for row in found if row.run]
  first = next((row.run for row in done if row.found), None)
  sections = [
    _table_section(runs, found),
    _rivals(found),
    *(_galleries(first) if first else []),
    _made_with(done),
  ]
  what = f"The paper's Table {runs.number}: " if runs.number else ''
  return Page(
    title=runs.title,
    subtitle=f'{what}{len(done)} of {len(runs.runs)} rows run. '
    + '; '.join(_settings(found)),
    answers=_answers(found),
    sections=sections,
  )


def _answers(found: Sequence[Row]) -> list[Answer]:
  routed = [row for row in found if row.found]
  if not routed:
    return [
      Answer('What is shown?', 'Fixed sizes', 'No run here has a router yet.')
    ]
  savings = sorted(row.found.saving.value for row in routed)
  better = [row for row in routed if row.found.best_fixed.gain.sign > 0]
  worse = [row for row in routed if row.found.best_fixed.gain.sign < 0]
  trained = [row for row in routed if row.over_fixed]
  beats = [row for row in trained if row.over_fixed.sign > 0]
  return [
    Answer(
      'How much does routing save?',
      f'{percent(savings[0], 0)} to {percent(savings[-1], 0)} %',
      "Of the multiply-adds of each run's own largest size, predictor counted, "
      f'over {_count(routed)}.',
    ),
    Answer(
      'Against a network trained at one size?',
      f'{len(beats)} of {len(trained)} better' if trained else 'Not run',
      'Top-1 of the router less that of the dearest network trained without '
      'one, on the same images: '
      + (_listed(trained, lambda row: row.over_fixed) or 'there is none here.'),
    ),
    Answer(
      'Is the gain real?',
      f'{len(better)} of {len(routed)} yes',
      'Against the best fixed size of the same weights at the same cost: '
      f'{len(better)} better, {len(worse)} worse, the others undecided. '
      + _listed(routed, lambda row: row.found.best_fixed.gain),
    ),
  ]


def _count(routed: Sequence[Row]) -> str:
  return 'one run' if len(routed) == 1 else f'{len(routed)} runs'


def _listed(some: Sequence[Row], difference) -> str:
  return '; '.join(
    f'{row.name} {wording.points(difference(row))}' for row in some
  )


def _settings(found: Sequence[Row]) -> list[str]:
  """Data set and network of our runs, each once."""
  return list(dict.fromkeys(_setting(row.run) for row in found if row.run))


def _setting(run: Run) -> str:
  return f'{run.data}, {run.network}'


def _table_section(runs: RunSet, found: Sequence[Row]) -> Section:
  number = runs.number
  return Section(
    title=f'Table {number}: {runs.table.title}' if number else 'All runs',
    text=[
      "The paper's figures are those it prints, for its own data set and "
      'network; ours are for the data set and network named over them.'
    ]
    if number
    else [],
    figures=_figures(runs, found),
    tables=[table(runs, found)],
  )


def table(runs: RunSet, found: Sequence[Row]) -> Table:
  """The paper's figures in columns of their own, ours in others."""
  run = next((row.run for row in found if row.run), None)
  scale, unit = plots.unit(run.record) if run else (1.0, 'GMACs')
  settings = _settings(found)
  header, groups = [''], [('', 1)]
  printed = _printed(found)
  if runs.table:
    header += [_PAPERS[field] for field in printed]
    groups.append((f'the paper: {runs.table.setting}', len(printed)))
  columns = [
    'sizes',
    unit,
    '% of full',
    'top-1, %',
    'top-5, %',
    'over the fixed network, points',
    'over best fixed at the same cost, points',
    'parameters, M',
  ]
  if len(settings) > 1:
    columns.insert(0, 'run on')
  header += columns
  ours = settings[0] if len(settings) == 1 else 'each as its row says'
  groups.append(
    (f'ours: {ours}' if settings else 'ours: not run', len(columns))
  )
  cells = []
  for row in found:
    line = [row.name]
    line += [getattr(row.paper, field, '') for field in printed]
    cells.append(line + _our_cells(row, found, scale, len(settings) > 1))
  return Table(
    header=header,
    groups=groups,
    rows=cells,
    note='Empty: not run, or not printed. Brackets: 95 % bootstrap intervals '
    'over the test images; they say nothing of another training run. A run '
    'without a router is scored at its largest size.',
  )


def _printed(found: Sequence[Row]) -> list[str]:
  """The columns that the paper's table has."""
  return [
    field
    for field in _PAPERS
    if any(row.paper and getattr(row.paper, field) for row in found)
  ]


def _our_cells(row: Row, found: Sequence[Row], scale, named: bool) -> list[str]:
  empty = [''] * (8 + named)
  if row.name == _MEAN:
    draws = [r.scored for r in found if r.run and r.name.startswith('random ')]
    if not draws:
      return empty
    top1 = [100 * s.top1.value for s in draws]
    cells = list(empty)
    cells[1 + named] = wording.figures(
      scale * np.mean([s.gmacs.value for s in draws])
    )
    cells[3 + named] = f'{np.mean(top1):.2f} ± {np.std(top1):.2f}'
    return cells
  if not row.run:
    return empty
  scored, record = row.scored, row.run.record
  parameters = row.run.evaluation.get('parameters')
  cells = [
    row.run.sizes,
    wording.figures(scale * scored.gmacs.value),
    percent(scored.gmacs.value / record.gmacs.max()),
    percent_interval(scored.top1),
    percent(scored.top5),
    wording.points(row.over_fixed) if row.over_fixed else '',
    wording.points(row.found.best_fixed.gain) if row.found else '',
    f'{parameters / 1e6:.2f}' if parameters else '',
  ]
  return [_setting(row.run), *cells] if named else cells


def _figures(runs: RunSet, found: Sequence[Row]) -> dict[str, str]:
  """The paper's Figure 3 over multiply-adds: ours, and the table's."""
  numbered = list(enumerate(found, 1))
  done = [(k, row) for k, row in numbered if row.run]
  figures = {}
  if done:
    scale, unit = plots.unit(done[0][1].run.record)
    ours = {
      row.name: (
        k,
        scale * row.scored.gmacs.value,
        100 * row.scored.top1.value,
        row.scored.top1,
      )
      for k, row in done
    }
    label = f'average cost of an image, {unit} (ours)'
    figures['ours'] = plots.points(ours, 'ours', label)
  if runs.table:
    papers = {
      row.name: (k, float(row.paper.gmacs), float(row.paper.top1[:5]), None)
      for k, row in numbered
      if row.paper
    }
    label = "average cost of an image, GMACs (the paper's)"
    figures['papers'] = plots.points(papers, 'papers', label, papers=True)
  return figures


def _rivals(found: Sequence[Row]) -> Section:
  lines = []
  for row in found:
    if not row.found:
      continue
    f = row.found
    rivals = (f.full, f.best_fixed, f.random, f.cascade, f.oracle)
    lines.append(
      [row.name, percent_interval(f.saving)]
      + [wording.points(r.gain) if r else '' for r in rivals]
    )
  return Section(
    title='Each router against its rivals',
    text=[
      'Top-1 of the router less that of the rival, in points, on the same '
      'weights and images. All but the first and the last cost what the router '
      'costs. Each run has a page of its own in its workdir.'
    ],
    tables=[
      Table(
        header=[
          '',
          'saved, %',
          'full size',
          'best fixed',
          'random',
          'confidence cascade',
          'oracle (a bound)',
        ],
        rows=lines,
      )
    ]
    if lines
    else [],
  )


def _galleries(run: Run) -> list[Section]:
  galleries = run_page.size_galleries(run)
  sections = [
    Section(
      title='Which size does an image need? (Figure 1)',
      text=[f'Run {run.name}, by the smallest size that is right.'],
      figures={'sizes': plots.sizes(run.record, run_page.chosen(run).choice)},
      galleries=galleries['needed'],
    )
  ]
  if galleries.get('chosen'):
    sections.append(
      Section(
        title='Which size is chosen? (Figure 4)',
        text=[f'Run {run.name}; the class it says and its probability.'],
        galleries=galleries['chosen'],
      )
    )
  return sections


def _made_with(done: Sequence[Row]) -> Section:
  lines = []
  for row in done:
    last = row.run.sessions[-1] if row.run.sessions else {}
    facts = [last.get(k, '') for k in ('time', 'commit', 'device', 'versions')]
    lines.append([row.name, row.run.path, *facts])
  return Section(
    title='What made these numbers',
    tables=[
      Table(
        header=['', 'workdir', 'evaluated', 'commit', 'device', 'versions'],
        rows=lines,
      )
    ],
    folded=True,
  )


def _csv_row(row: Row) -> dict[str, Any]:
  """Raw values, the paper's in columns that say so."""
  paper = dataclasses.asdict(row.paper) if row.paper else {}
  line = {'row': row.name}
  for field in dataclasses.fields(PaperRow):
    line[f'paper_{field.name}'] = paper.get(field.name, '')
  s = row.scored
  line |= {
    'data': row.run.data if row.run else '',
    'network': row.run.network if row.run else '',
    'policy': s.name if s else '',
    'gmacs': s.gmacs.value if s else '',
    'full_gmacs': row.run.record.gmacs.max() if s else '',
    'top5': s.top5 if s else '',
  }
  intervals = {
    'top1': s and s.top1,
    'over_fixed': row.over_fixed,
    'over_best_fixed': row.found and row.found.best_fixed.gain,
    'over_random': row.found and row.found.random.gain,
    'over_cascade': row.found and row.found.cascade and row.found.cascade.gain,
  }
  for name, around in intervals.items():
    value = dataclasses.asdict(around) if around else {}
    line[name] = value.get('value', '')
    line[f'{name}_low'] = value.get('low', '')
    line[f'{name}_high'] = value.get('high', '')
  last = row.run.sessions[-1] if row.run and row.run.sessions else {}
  return line | {k: last.get(k, '') for k in ('commit', 'device', 'time')}
