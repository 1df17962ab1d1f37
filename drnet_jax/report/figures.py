# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation, each as png and svg."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from drnet_jax.choosing import scores
from drnet_jax.choosing.record import Record
from drnet_jax.choosing.scores import Score
from drnet_jax.report.plots import as_written, in_legend

_COLOURS = ('#228833', '#aa3377', '#ee7733', '#66ccee', '#222222')


def exit_curves(
  record: Record,
  curves: Sequence[tuple[str, Sequence[Score]]],
  papers: Sequence[tuple[str, Sequence[tuple[float, float]]]],
  path: str,
) -> None:
  """Early exit at many budgets, beside every image at the same exit.

  Args:
    record: of the test split.
    curves: name and points of each network, or of the best of them.
    papers: name and points (MMACs, top-1 in %) of curves that are the paper's.
    path: of the files, without ending.
  """
  figure = Figure(figsize=(6.8, 4.6), layout='constrained')
  axes = figure.add_subplot()
  fixed = scores.fixed_scores(record)
  axes.step(
    [1e3 * p.gmacs for p in fixed],
    [100 * p.top1 for p in fixed],
    'o-',
    where='post',
    color='#4477aa',
    lw=1,
    label='anytime: all images at one exit',
  )
  axes.set_prop_cycle(color=_COLOURS)
  for name, points in curves:
    ordered = sorted(points, key=lambda p: p.gmacs)
    axes.plot(
      [1e3 * p.gmacs for p in ordered],
      [100 * p.top1 for p in ordered],
      '.-',
      lw=1,
      label=in_legend(name),
    )
  for name, points in papers:
    axes.plot(*zip(*points, strict=True), 'x--', color='#999999', label=name)
  _label(axes, 'average cost of an image, MMACs')
  _save(figure, path)


def models(rows: Sequence[Mapping[str, Any]], path: str) -> None:
  """Several models, against multiply-adds and against milliseconds.

  Args:
    rows: as from `bench.models.measure`.
    path: of the files, without ending.
  """
  figure = Figure(figsize=(9.6, 4.4), layout='constrained')
  for axes, field, scale, label in zip(
    figure.subplots(1, 2, sharey=True),
    ('gmacs', 'ms_per_image'),
    (1e3, 1),
    ('average cost of an image, MMACs', 'time of an image on this machine, ms'),
    strict=True,
  ):
    for name in dict.fromkeys(row['model'] for row in rows):
      points = sorted(
        (scale * row[field], 100 * row['top1'])
        for row in rows
        if row['model'] == name
      )
      axes.plot(*zip(*points, strict=True), 'o-', label=in_legend(name))
    _label(axes, label)
  _save(figure, path)


def latency(
  curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
  label: str,
  path: str,
) -> None:
  """Something against the latency of an image (Figure 3 of the paper).

  Args:
    curves: name, milliseconds, and what lies over them.
    label: of the upright axis.
    path: of the files, without ending.
  """
  figure = Figure(figsize=(6.4, 4.4), layout='constrained')
  axes = figure.add_subplot()
  for name, ms, values in curves:
    mark = 'o-' if len(ms) > 1 else '*'
    axes.plot(ms, values, mark, ms=8, label=in_legend(name))
  _label(axes, 'latency of one image on this machine, ms', label, 'best')
  _save(figure, path)


def _label(axes, x: str, y='top-1, %', legend='lower right') -> None:
  axes.set_xlim(left=0)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.grid(alpha=0.3)
  axes.legend(loc=legend, fontsize=9)


def _save(figure: Figure, path: str) -> None:
  as_written(figure).savefig(f'{path}.png', dpi=150)
  figure.savefig(f'{path}.svg')
