# SPDX-License-Identifier: Apache-2.0
"""Figures: of pages as SVG with text as text, others as png and svg.

Colours of pages are written as they are for light; CSS within each figure says
what they become in the dark.
"""

import io
import itertools
import re
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from drnet_jax.choosing import scores
from drnet_jax.choosing.record import Record
from drnet_jax.report import wording

_INK, _GRID = '#222222', '#d4d4d4'
_BLUE, _RED, _GREEN = '#4477aa', '#cc3311', '#228833'
_PURPLE, _GREY = '#aa3377', '#888888'
# Of sizes, the smallest first.
_SIZES = ('#bfe0ee', '#8cc4de', '#5ba6cb', '#3685b5', '#1f669a', '#124a7a')
_DARK = {
  _INK: '#e2e2e2',
  _GRID: '#44474d',
  _BLUE: '#86b6e6',
  _RED: '#ff8066',
  _GREEN: '#5fcf80',
  _PURPLE: '#e58abf',
  _GREY: '#a5a5a5',
  '#1f669a': '#2a77af',
  '#124a7a': '#235b8c',
}

_STYLE = {
  'axes.edgecolor': _INK,
  'axes.labelcolor': _INK,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'font.size': 10,
  'grid.color': _GRID,
  'legend.edgecolor': 'none',
  'legend.facecolor': 'none',
  'legend.fontsize': 9,
  'svg.fonttype': 'none',
  'text.color': _INK,
  'xtick.color': _INK,
  'ytick.color': _INK,
}
_WIDTH = 5.0  # inches: 360 points, so a phone shows the text at its own size

_LONG_NAME = 30  # characters; two of them are wider than a figure
_MOST_BARS = 30  # classes; more are drawn as points


class Curve(NamedTuple):
  """A line, or points.

  Attributes:
    name: in the legend.
    x, y: of the points.
    look: arguments of matplotlib's `plot`.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  look: Mapping[str, Any] = types.MappingProxyType({'marker': 'o'})

  @classmethod
  def of(
    cls, name: str, points: Sequence[scores.Score], scale: float, **look: Any
  ) -> 'Curve':
    """Top-1 in % over cost, in GMACs times a scale."""
    x = [scale * point.gmacs for point in points]
    return cls(name, x, [100 * point.top1 for point in points], look)


def write(
  panels: Mapping[str, Sequence[Curve]], path: str, y: str = 'top-1, %'
) -> None:
  """Draws curves for a reader of files, as png and svg.

  Args:
    panels: curves by the label of their x, a panel each.
    path: of the files, without ending.
    y: label of what lies upright.
  """
  size = (3.2 + 3.2 * len(panels), 4.4)
  figure = Figure(figsize=size, layout='constrained')
  grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
  for axes, (x, curves) in zip(grid[0], panels.items(), strict=True):
    _draw(axes, curves, x, y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
  _as_written(figure).savefig(f'{path}.png', dpi=150)
  figure.savefig(f'{path}.svg')


@matplotlib.rc_context(_STYLE)
def accuracy_cost(
  record: Record,
  fixed: Sequence[scores.Scored],
  judged: scores.Judgement | None,
  curves: Mapping[str, Sequence[scores.Score]],
) -> str:
  """Top-1 against average cost, with 95 % intervals (the paper's Figure 3).

  Args:
    record: of a split.
    fixed: every option.
    judged: a policy among its rivals, if something chooses.
    curves: policies by name, each at several costs.
  """
  figure, (axes,) = _figure(3.9)
  scale, name = wording.unit(record)
  costs, top1 = scores.upper_hull(record.gmacs, record.top1.mean(0))
  hull = {'color': _BLUE, 'lw': 1}
  drawn = [Curve('best fixed or mixture', scale * costs, 100 * top1, hull)]
  styles = itertools.cycle(
    ((_GREEN, '-'), (_PURPLE, '--'), (_GREY, '--'), (_RED, ':'))
  )
  for label, points in curves.items():
    colour, style = next(styles)
    look = {'color': colour, 'ls': style, 'lw': 1.2}
    drawn.append(Curve.of(label, points, scale, **look))
  mark = {'color': _GREY, 'marker': '^', 'ls': ''}
  bound = Curve.of('oracle (a bound)', [scores.oracle(record)], scale, **mark)
  for scored, option in zip(fixed, record.options.names, strict=True):
    _point(axes, scored, scale, 'o', _BLUE, '')
    axes.annotate(
      option.removeprefix('exit '),
      (scale * scored.gmacs.value, 100 * scored.top1.value),
      (6, -11),
      textcoords='offset points',
      fontsize=9,
    )
  if judged:
    _point(axes, judged.random, scale, 'X', _RED, 'random, same cost')
    _point(axes, judged.policy, scale, '*', _GREEN, judged.policy.name, 13)
    if trained := judged.others.get('router as trained'):
      _point(axes, trained, scale, 'D', _PURPLE, trained.name, 6)
  _draw(axes, [*drawn, bound], f'average cost of an image, {name}')
  return _svg(figure, 'accuracy_cost', legend=2)


@matplotlib.rc_context(_STYLE)
def sizes(record: Record, ends: np.ndarray | None) -> str:
  """Shares of the images by where they end and by what they need.

  Args:
    record: of a split.
    ends: int [N], index of the option; None if nothing chooses.
  """
  names = [*record.options.names, 'none']
  needed = scores.smallest_sufficient(record)
  bars = {'cheapest correct': (needed, _GREY)}
  if ends is not None:
    bars = {'ends at': (ends, _GREEN)} | bars
  figure, (axes,) = _figure(2.9)
  width = 0.8 / len(bars)
  for k, (label, (index, colour)) in enumerate(bars.items()):
    shares = 100 * np.bincount(index, minlength=len(names)) / len(index)
    places = np.arange(len(names)) + (k - (len(bars) - 1) / 2) * width
    drawn = axes.bar(places, shares, width, color=colour, label=label)
    axes.bar_label(drawn, [f'{x:.0f}' for x in shares], fontsize=8, padding=2)
  axes.set_xticks(range(len(names)), names)
  axes.set_ylabel('% of the images')
  axes.grid(visible=False, axis='x')
  return _svg(figure, 'sizes', legend=2)


@matplotlib.rc_context(_STYLE)
def classes(effects: Sequence[scores.ClassEffect], record: Record) -> str:
  """What a policy does to each class: change of top-1, and cost."""
  change = np.array([100 * e.change.value for e in effects])
  cost = np.array([100 * e.gmacs / record.costs.full for e in effects])
  if len(effects) > _MOST_BARS:
    figure, (axes,) = _figure(3.6)
    axes.plot(cost, change, '.', color=_BLUE, alpha=0.6)
    axes.axhline(0, color=_INK, lw=0.8)
    axes.set_xlabel('average cost of the class, % of the full size')
    axes.set_ylabel('change of top-1, points')
    return _svg(figure, 'classes')
  figure, (left, right) = _figure(
    0.9 + 0.22 * len(effects), columns=2, sharey=True, width_ratios=(2, 1)
  )
  places = np.arange(len(effects))
  margins = np.nan_to_num(
    [100 * (e.change.high - e.change.value) for e in effects]
  )
  for sign, colour in ((-1, _RED), (1, _GREEN)):
    some = np.sign(change) == sign
    left.barh(places[some], change[some], color=colour, alpha=0.85)
  left.errorbar(change, places, xerr=margins, fmt='none', ecolor=_INK, lw=0.8)
  left.axvline(0, color=_INK, lw=0.8)
  left.set_yticks(places, [_short(e.name) for e in effects])
  left.invert_yaxis()
  left.set_xlabel('change of top-1, points')
  right.barh(places, cost, color=_BLUE)
  right.tick_params(left=False)
  right.set_xlabel('cost, % of full')
  return _svg(figure, 'classes')


@matplotlib.rc_context(_STYLE)
def routing(
  metrics: Mapping[str, Mapping[int, float]], options: Sequence[str]
) -> str:
  """Shares of the sizes, entropy and hinge over the training of the router.

  Args:
    metrics: values by step of each metric of its stage.
    options: the sizes, '112 px' or so.
  """
  figure, (shares, entropy, hinge) = _figure(5.2, rows=3, sharex=True)
  series = [
    metrics[f'train/share_r{option.removesuffix(" px")}'] for option in options
  ]
  picked = np.linspace(0, len(_SIZES) - 1, len(options)).round().astype(int)
  shares.stackplot(
    list(series[0]),
    *[[100 * x for x in s.values()] for s in series],
    labels=options,
    colors=[_SIZES[i] for i in picked],
  )
  shares.set_ylim(0, 100)
  shares.set_ylabel('share, %')
  shares.grid(visible=False)
  for axes, name, label, colour in (
    (entropy, 'train/entropy', 'entropy, nats', _PURPLE),
    (hinge, 'train/hinge', 'hinge loss', _RED),
  ):
    values = metrics[name]
    axes.plot(list(values), list(values.values()), color=colour)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
  entropy.axhline(np.log(len(options)), color=_GREY, ls=':', lw=1.2)
  entropy.set_ylim(top=1.1 * np.log(len(options)))
  hinge.set_xlabel('training step')
  figure.align_ylabels()
  return _svg(figure, 'routing', legend=len(options))


@matplotlib.rc_context(_STYLE)
def latency(curves: Sequence[Curve]) -> str:
  """Top-1 in % against measured milliseconds (the paper's Figure 3)."""
  figure, (axes,) = _figure(3.6)
  axes.set_prop_cycle(color=(_BLUE, _GREEN, _PURPLE, _RED, _GREY, _INK))
  _draw(axes, curves, 'latency of one image, ms')
  return _svg(figure, 'latency', legend=2)


@matplotlib.rc_context(_STYLE)
def budgets(
  policies: Mapping[str, tuple[np.ndarray, np.ndarray]],
  fixed: Mapping[str, tuple[np.ndarray, np.ndarray]],
  label: str,
) -> str:
  """Top-1 in % over cost: policies of some runs, and what is held against them.

  Args:
    policies: costs and top-1 of the best for each budget, by the run's name.
    fixed: of fixed options, by what they are of; those of a run have its
      colour.
    label: of the cost.
  """
  figure, (axes,) = _figure(3.6 + 0.2 * len(fixed))
  palette = itertools.cycle((_GREEN, _PURPLE, _BLUE, _GREY, _INK))
  colours = dict(zip(policies, palette, strict=False))
  curves = [
    Curve(f'{name}, best policy', *found, {'color': colours[name], 'lw': 1.6})
    for name, found in policies.items()
  ]
  for name, found in fixed.items():
    look, what = {'marker': 's', 'ls': '--', 'color': _RED}, name
    if name in colours:
      look = {'marker': 'o', 'ls': ':', 'color': colours[name]}
      what = f'{name}, fixed sizes'
    curves.append(Curve(what, *found, look | {'lw': 1, 'ms': 4}))
  _draw(axes, curves, label)
  return _svg(figure, 'budgets', legend=1)


@matplotlib.rc_context(_STYLE)
def numbered_rows(
  named: Mapping[str, tuple[int, float, float, scores.Interval | None]],
  name: str,
  label: str,
) -> str:
  """Rows of a table by their number: top-1 in % against cost.

  Args:
    named: number, cost, top-1 and its interval, by the row's name; the paper's,
      which have none, are drawn in another colour.
    name: of the figure.
    label: of the cost.
  """
  columns = 1 if max(map(len, named)) > _LONG_NAME else 2
  figure, (axes,) = _figure(3.3 + 0.2 * len(named) / columns)
  for row, (k, cost, top1, around) in named.items():
    colour = _BLUE if around else _GREY
    if around:
      low, high = 100 * around.low, 100 * around.high
      axes.plot([cost, cost], [low, high], color=colour, lw=1, alpha=0.5)
    axes.plot(cost, top1, 'o', color=colour, ms=4)
    # Numbers, for names would lie over one another; the legend has both.
    mark, in_legend = f'${k}$', _in_legend(row)
    axes.plot([], [], marker=mark, ls='', color=_INK, ms=8, label=in_legend)
  for numbers, cost, top1 in _groups(list(named.values())):
    axes.annotate(
      ', '.join(map(str, numbers)),
      (cost, top1),
      xytext=(5, 0),
      textcoords='offset points',
      va='center',
    )
  axes.margins(0.15, 0.1)
  axes.set_xlabel(label)
  axes.set_ylabel('top-1, %')
  return _svg(figure, name, legend=columns)


def _groups(
  rows: Sequence[tuple[int, float, float, scores.Interval | None]],
) -> list[tuple[list[int], float, float]]:
  """Numbers of rows that lie nearly at one place, with the first one's."""
  places = np.array([row[1:3] for row in rows])
  near = 0.03 * np.ptp(places, axis=0)
  groups = []
  for (number, *_), place in zip(rows, places, strict=True):
    for numbers, *first in groups:
      if (abs(place - first) <= near).all():
        numbers.append(number)
        break
    else:
      groups.append(([number], *place))
  return groups


def _draw(axes, curves: Sequence[Curve], x: str, y: str = 'top-1, %') -> None:
  """Curves over a cost; what is drawn later may lie outside of the axes."""
  for name, costs, values, look in curves:
    axes.plot(costs, values, label=_in_legend(name), **look)
  axes.set_xlim(left=0)
  axes.set_xlabel(x)
  axes.set_ylabel(y)


def _point(axes, scored: scores.Scored, scale, mark, colour, label, size=7):
  cost, top1 = scored.gmacs, scored.top1
  xerr, yerr = (
    # By rounding, a number may lie just outside of an interval of no width.
    factor * np.maximum(0, [[x.value - x.low], [x.high - x.value]])
    for factor, x in ((scale, cost), (100, top1))
  )
  axes.errorbar(
    scale * cost.value,
    100 * top1.value,
    xerr=xerr,
    yerr=yerr,
    fmt=mark,
    color=colour,
    ms=size,
    elinewidth=1,
    label=label,
    zorder=3,  # above curves
  )


def _figure(height: float, *, rows=1, columns=1, **options):
  """A figure of `_WIDTH` by so many inches, and its axes."""
  figure = Figure(figsize=(_WIDTH, height), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False, **options)
  return figure, grid.ravel()


def _svg(figure: Figure, name: str, legend: int = 0) -> str:
  """A figure as the text of an SVG file.

  Its identifiers begin with its name: many figures share a page.

  Args:
    figure: to write.
    name: of it.
    legend: columns of the legend; 0: there is none.
  """
  if legend:
    figure.legend(loc='outside lower center', ncols=legend)
  text = io.StringIO()
  with (
    matplotlib.rc_context({'svg.hashsalt': name}),
    warnings.catch_warnings(),
  ):
    # Text stays text: whoever shows it has the font, or not.
    warnings.filterwarnings('ignore', 'Glyph .* missing from font')
    _as_written(figure).savefig(
      text,
      format='svg',
      transparent=True,
      metadata={'Date': None, 'Creator': None},
    )
  svg = text.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'(id="|url\(#|href="#)', rf'\g<1>{name}-', svg)
  rules = [
    f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
    for light, dark in _DARK.items()
    for what in ('fill', 'stroke')
  ]
  style = '@media (prefers-color-scheme: dark){' + ''.join(rules) + '}'
  start = svg.index('>') + 1
  return f'{svg[:start]}<style>{style}</style>{svg[start:]}'


def _in_legend(name: str) -> str:
  """A label that has a place there: without it one with a `_` before it."""
  return '\u200b' + name if name.startswith('_') else name


def _as_written(figure: Figure) -> Figure:
  """The same, with names as they are: `$` begins no formula."""
  for text in figure.findobj(matplotlib.text.Text):
    text.set_parse_math(False)
  return figure


def _short(name: str, most: int = 22) -> str:
  name = name.partition(',')[0]
  return name if len(name) <= most else name[: most - 1] + '…'
