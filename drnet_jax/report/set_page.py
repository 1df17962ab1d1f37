# SPDX-License-Identifier: Apache-2.0
"""The report of several runs: tables of the paper's, or one of their own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drnet_jax import tables
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing import scores
from drnet_jax.choosing.scores import Interval, Judgement, Scored
from drnet_jax.report import page, plots, run_page, set_budgets, wording
from drnet_jax.report.evaluated import EvaluatedRun
from drnet_jax.report.page import Page, Section, Table
from drnet_jax.report.paper_tables import TABLES
from drnet_jax.report.run_set import RunSet
from drnet_jax.report.wording import Answer, percent, percent_interval

_PARAMETERS = 'parameters, M'
_PAPERS = {
  'gmacs': 'GMACs',
  'top1': 'top-1, %',
  'top5': 'top-5, %',
  'parameters': _PARAMETERS,
}
_OVER_FIXED = 'over the fixed network, points'
_OVER_BEST = 'over best fixed at the same cost, points'
_MEAN = 'random mean'  # of Table 5, computed from the rows 'random ...'


class Row(NamedTuple):
  """One evaluated run of a set.

  Attributes:
    over_fixed: its top-1 less that of the same network where nothing chooses
      (the most expensive of the set), on the same images; None if it is that
      network, or if there is none.
  """

  name: str
  run: EvaluatedRun
  over_fixed: Interval | None

  @property
  def judgement(self) -> Judgement | None:
    """Its router, or without one its policy, among its rivals; None if none."""
    return self.run.router_judgement or self.run.judgement

  @property
  def over_best(self) -> Interval | None:
    """Its top-1 less that of the best fixed size of its weights at its cost."""
    return self.judgement and self.judgement.best_fixed.gain

  @property
  def scored(self) -> Scored:
    """Its router, else its policy, or its largest size if nothing chooses."""
    if self.judgement:
      return self.judgement.policy
    return self.run.fixed[self.run.record.gmacs.argmax()]


def rows(runs: RunSet) -> dict[str, Row]:
  """The evaluated rows of a set by name."""
  done = {name: run for name, run in runs.runs.items() if run}
  found = {}
  for name, run in done.items():
    alone = [
      other
      for other in done.values()
      if not other.policy and other.setting == run.setting
    ]
    base = max(alone, key=lambda r: r.record.costs.full, default=run)
    gain = None
    if base is not run and run.record.is_of_images_of(base.record):
      gain = scores.difference(_right(run), _right(base), run.record.groups)
    found[name] = Row(name, run, gain)
  return found


def _right(run: EvaluatedRun) -> np.ndarray:
  """Whether each image is classified correctly as the run is scored."""
  record, policy = run.record, run.router or run.policy
  if policy is None:
    policy = policy_lib.fixed(int(record.gmacs.argmax()))
  return policy_lib.decide(policy, record, record.costs).right.astype(float)


def write(runs: RunSet, directory: str) -> Page:
  """Writes the report of several runs.

  That is `index.html`, which needs no other file, `report.md`, `runs.csv`,
  where runs are calibrated `budgets.csv`, and the figures as svg.
  """
  found = rows(runs)
  each = _each_run(found)
  budgets = set_budgets.of({row.name: row.run for row in each})
  shown = next((row.run for row in each if row.judgement), None)
  numbered = _tables(runs).items()
  sections = [
    *(_table_section(number, names, found) for number, names in numbered),
    budgets and set_budgets.section(budgets),
    _rivals(each),
    *(_galleries(shown) if shown else []),
    _made_with(each),
  ]
  report = Page(
    title=runs.title,
    subtitle=f'{len(found)} of {len(runs.runs)} rows run. '
    + '; '.join(_settings(each)),
    answers=_answers(each),
    sections=[section for section in sections if section],
    csv={
      'runs': [
        _csv_row(number, name, found.get(name))
        for number, names in numbered
        for name in names
      ],
      'budgets': [set_budgets.csv_row(budget) for budget in budgets],
    },
  )
  return page.write(report, directory)


def _tables(runs: RunSet) -> dict[int | None, list[str]]:
  """Names of the rows of each of the paper's tables; None: of none of them."""
  found = {number: list(TABLES[number].rows) for number in runs.tables}
  placed = set().union(*found.values())
  others = [name for name in runs.runs if name not in placed]
  return found | {None: others} if others else found


def _each_run(found: Mapping[str, Row]) -> list[Row]:
  """Every run once, under its first name."""
  first = {}
  for row in found.values():
    first.setdefault(row.run.path, row)
  return list(first.values())


def _answers(each: Sequence[Row]) -> list[Answer]:
  choosing = [row for row in each if row.judgement]
  if not choosing:
    what = 'Fixed sizes' if each else 'Nothing yet'
    return [Answer('What is shown?', what, 'Nothing chooses in any of them.')]
  savings = sorted(row.judgement.saving.value for row in choosing)
  ends = dict.fromkeys(percent(x, 0) for x in (savings[0], savings[-1]))
  gains = {row.name: row.over_best for row in choosing}
  better = sum(gain.sign > 0 for gain in gains.values())
  worse = sum(gain.sign < 0 for gain in gains.values())
  trained = {row.name: row.over_fixed for row in choosing if row.over_fixed}
  beats = sum(gain.sign > 0 for gain in trained.values())
  return [
    Answer(
      'How much does choosing save?',
      f'{" to ".join(ends)} %',
      "Of the multiply-adds of each run's own largest size, predictor counted, "
      f'over {len(choosing)} run{"s" * (len(choosing) > 1)}.',
    ),
    Answer(
      'Against a network trained at one size?',
      f'{beats} of {len(trained)} better' if trained else 'Not run',
      'Top-1 of the router, or without one of the best policy, less that of '
      'the most expensive network where nothing chooses, on the same images: '
      + (_listed(trained) or 'there is none here.'),
    ),
    Answer(
      'Is the gain real?',
      f'{better} of {len(choosing)} yes',
      'Against the best fixed size of the same weights at the same cost: '
      f'{better} better, {worse} worse, the others undecided. '
      + _listed(gains),
    ),
  ]


def _listed(gains: Mapping[str, Interval]) -> str:
  return '; '.join(f'{k} {wording.points(gain)}' for k, gain in gains.items())


def _settings(some: Iterable[Row]) -> list[str]:
  """Data sets and networks, each once."""
  return list(dict.fromkeys(row.run.setting for row in some))


def _table_section(
  number: int | None, names: Sequence[str], found: Mapping[str, Row]
) -> Section:
  if number is None:
    title, text = 'Our own runs', []
  else:
    title = f"The paper's Table {number}: {TABLES[number].title}"
    text = [
      "The paper's numbers are as printed, for its own data set and network; "
      'ours are for the data set and network named above them.'
    ]
  return Section(
    title=title,
    text=text,
    figures=_figures(number, names, found),
    table=table(number, names, found),
  )


def table(
  number: int | None, names: Sequence[str], found: Mapping[str, Row]
) -> Table:
  """The paper's numbers in columns of their own, ours in others.

  Args:
    number: of the paper's table; None for a table of ours alone.
    names: of its rows.
    found: the rows that are evaluated, and others.
  """
  some = [found[name] for name in names if name in found]
  settings = _settings(some)
  several = len(settings) > 1
  where = 'as each says' if several else ''.join(settings) or 'not run'
  scale, unit = wording.unit(some[0].run.record) if some else (1.0, 'GMACs')
  ours = []
  for name in names:
    cells = _our_cells(found.get(name), unit, scale)
    if name == _MEAN and name not in found:
      cells |= _mean_of_draws(some, unit, scale)
    if not several:
      del cells['run on']
    ours.append(cells)
  groups = {'': [{'': name} for name in names]}
  if number:
    rows = [TABLES[number].rows[name] for name in names]
    printed = [f for f in _PAPERS if any(getattr(row, f) for row in rows)]
    groups[f'the paper: {TABLES[number].setting}'] = [
      {_PAPERS[field]: getattr(row, field) for field in printed} for row in rows
    ]
  return Table.grouped(
    groups | {f'ours: {where}': ours},
    note='Empty: not run, or not printed. Brackets: 95 % bootstrap intervals '
    'over the test images; they do not cover the variation between training '
    'runs. A run without a router is scored by its best policy, and where '
    'nothing chooses at its largest size.',
  )


def _our_cells(row: Row | None, unit: str, scale: float) -> dict[str, str]:
  """By column; empty ones where there is no such run."""
  columns = ('run on', 'sizes', unit, '% of full', 'top-1, %', 'top-5, %')
  cells = dict.fromkeys((*columns, _OVER_FIXED, _OVER_BEST, _PARAMETERS), '')
  if not row:
    return cells
  scored, record = row.scored, row.run.record
  cells |= {
    'run on': row.run.setting,
    'sizes': row.run.sizes,
    unit: wording.three_digits(scale * scored.gmacs.value),
    '% of full': percent(scored.gmacs.value / record.costs.full),
    'top-1, %': percent_interval(scored.top1),
    'top-5, %': percent(scored.top5),
    _OVER_FIXED: wording.points(row.over_fixed),
    _OVER_BEST: wording.points(row.over_best),
  }
  if 'parameters' in row.run.evaluation:
    cells[_PARAMETERS] = f'{row.run.evaluation["parameters"] / 1e6:.2f}'
  return cells


def _mean_of_draws(
  some: Sequence[Row], unit: str, scale: float
) -> dict[str, str]:
  """Of the rows 'random 1' and so on, with their standard deviation."""
  draws = [row.scored for row in some if row.name.startswith('random ')]
  if not draws:
    return {}
  top1 = [100 * scored.top1.value for scored in draws]
  gmacs = np.mean([scored.gmacs.value for scored in draws])
  return {
    unit: wording.three_digits(scale * gmacs),
    'top-1, %': f'{np.mean(top1):.2f} ± {np.std(top1):.2f}',
  }


def _figures(
  number: int | None, names: Sequence[str], found: Mapping[str, Row]
) -> dict[str, str]:
  """The paper's Figure 3 over multiply-adds: ours, and the table's."""
  prefix = f'table{number}' if number else 'runs'
  figures = {}
  some = {k: found[name] for k, name in enumerate(names, 1) if name in found}
  if len(some) > 1:
    scale, unit = wording.unit(next(iter(some.values())).run.record)
    ours = {}
    for k, row in some.items():
      cost, top1 = row.scored.gmacs.value, row.scored.top1
      ours[row.name] = (k, scale * cost, 100 * top1.value, top1)
    name, label = f'{prefix}_ours', f'average cost of an image, {unit} (ours)'
    figures[name] = plots.numbered_rows(ours, name, label)
  if number:
    papers = {
      name: (k, float(row.gmacs), float(row.top1.split()[0]), None)
      for k, (name, row) in enumerate(TABLES[number].rows.items(), 1)
    }
    name = f'{prefix}_papers'
    label = "average cost of an image, GMACs (the paper's)"
    figures[name] = plots.numbered_rows(papers, name, label)
  return figures


def _rivals(each: Sequence[Row]) -> Section:
  lines = [
    {
      '': row.name,
      'saved, %': percent_interval(row.judgement.saving),
      'full size': wording.points(row.judgement.full.gain),
      'best fixed': wording.points(row.judgement.best_fixed.gain),
      'random': wording.points(row.judgement.random.gain),
      'oracle (a bound)': wording.points(row.judgement.oracle.gain),
    }
    for row in each
    if row.judgement
  ]
  return Section(
    title='Each against its rivals',
    text=[
      'Top-1 of the router, or of the best policy, less that of the rival, in '
      'points, on the same weights and images. All but the first and the last '
      'have its cost. Each run has a page of its own in its workdir.'
    ],
    table=Table.of(lines) if lines else None,
  )


def _galleries(run: EvaluatedRun) -> list[Section]:
  galleries, noun = run_page.size_galleries(run), run.record.options.noun
  sections = [
    Section(
      title=f'Which {noun} does an image need? (Figure 1)',
      text=[f'Run {run.name}, by the cheapest correct {noun}.'],
      figures={'sizes': plots.sizes(run.record, run.ends())},
      galleries=galleries['needed'],
    )
  ]
  if galleries.get('ends'):
    sections.append(
      Section(
        title='Where do images end? (Figure 4)',
        text=[f'Run {run.name}; the predicted class and its probability.'],
        galleries=galleries['ends'],
      )
    )
  return sections


def _made_with(each: Sequence[Row]) -> Section:
  facts = ('time', 'commit', 'device', 'versions')
  return Section(
    title='What made these numbers',
    table=Table(
      header=['', 'workdir', 'evaluated', 'commit', 'device', 'versions'],
      rows=[
        [row.name, row.run.path, *(row.run.session.get(k, '') for k in facts)]
        for row in each
      ],
    ),
    folded=True,
  )


def _csv_row(number: int | None, name: str, row: Row | None) -> dict[str, Any]:
  """Raw values, the paper's in columns that say so."""
  paper = TABLES[number].rows[name] if number else None
  line = {'table': number or '', 'row': name}
  line |= {f'paper_{field}': getattr(paper, field, '') for field in _PAPERS}
  columns = ('data', 'network', 'policy', 'gmacs', 'full_gmacs', 'top5')
  line |= dict.fromkeys(columns, '')
  session, judged = {}, row and row.judgement
  if row:
    session, scored = row.run.session, row.scored
    line |= {
      'data': row.run.data,
      'network': row.run.network,
      'policy': scored.name,
      'gmacs': scored.gmacs.value,
      'full_gmacs': row.run.record.costs.full,
      'top5': scored.top5,
    }
  intervals = {
    'top1': row and row.scored.top1,
    'saving': judged and judged.saving,
    'over_fixed': row and row.over_fixed,
    'over_best_fixed': row and row.over_best,
    'over_random': judged and judged.random.gain,
  }
  for name, around in intervals.items():
    line |= tables.interval(name, around)
  return line | {k: session.get(k, '') for k in ('commit', 'device', 'time')}
