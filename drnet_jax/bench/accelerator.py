# SPDX-License-Identifier: Apache-2.0
"""Measures an accelerator, part by part; the parts are in `accelerator_parts`.

Each part yields rows, which are in the csv file before the next is measured. A
part that fails, or is out of time, is noted there, and the next one begins.
Rows of parts that are not asked for stay as an earlier run left them.
"""

import contextlib
import csv
import os
import shutil
import signal
import time
from collections.abc import Iterator
from typing import TextIO

from drnet_jax import mesh as mesh_lib
from drnet_jax import tables
from drnet_jax.bench.accelerator_parts import (
  ORIGINS,
  PARTS,
  TRAINING,
  Suite,
  short,
)
from drnet_jax.errors import UserError
from drnet_jax.report import page
from drnet_jax.report.page import Page, Section, Table
from drnet_jax.report.wording import Answer

FILE = 'accelerator.csv'
COLUMNS = ('part', 'what', 'measure', 'value')


def run(suite: Suite) -> str:
  """Runs all parts; returns the tables as Markdown."""
  os.makedirs(suite.out, exist_ok=True)
  _take_up(suite)
  begin = time.perf_counter()
  for name, (limit_s, part) in PARTS.items():
    if name[0] not in suite.parts:
      continue
    left_s = suite.seconds - (time.perf_counter() - begin)
    if not suite.small:
      left_s = min(left_s, limit_s)
    start, status = time.perf_counter(), 'finished'
    suite.found[name] = []
    if left_s < 1:
      status = 'left out: no time'
    else:
      try:
        with _time_limit(left_s):
          for row in part(suite, left_s):
            _note(suite, name, row)
      except Exception as error:
        status = f'{type(error).__name__}: {short(error)}'
    took = time.perf_counter() - start
    _note(suite, name, {'what': 'part', 'status': status, 'seconds': took})
  made = _page(suite)
  page.write(made, suite.out)
  return page.markdown(made, suite.out)


def _take_up(suite: Suite) -> None:
  """Keeps what an earlier suite found, but of the parts that are asked for.

  Raises:
    UserError: that was another device's.
  """
  path, kept = os.path.join(suite.out, FILE), []
  if os.path.exists(path):
    with open(path, newline='') as file:
      rows = csv.DictReader(file)
      kept = [row for row in rows if row['part'][0] not in suite.parts]
  rows = []
  for cell in kept:
    part, what, key = cell['part'], cell['what'], cell['measure']
    last = rows[-1] if rows else ('', {})
    # A row that has the measure already is followed by one of the same name.
    if (part, what) != (last[0], last[1].get('what')) or key in last[1]:
      rows.append((part, {'what': what}))
    rows[-1][1][key] = _as_number(cell['value'])
  here = mesh_lib.describe()
  for part, row in rows:
    if row['what'] == 'device' and 'value' in row and row['value'] != here:
      raise UserError(
        f'{path} is of {row["value"]}, and this is {here}: name another folder'
      )
    suite.found.setdefault(part, []).append(row)
  if TRAINING[0] in suite.parts:
    for name in ORIGINS:
      folder = os.path.join(suite.out, name.replace(' ', '_'))
      shutil.rmtree(folder, ignore_errors=True)
  partial = f'{path}.partial'
  with open(partial, 'w', newline='') as file:
    csv.writer(file).writerow(COLUMNS)
    for part, row in rows:
      _append(file, part, row)
  os.replace(partial, path)


def _as_number(text: str) -> float | str:
  try:
    return float(text)
  except ValueError:
    return text


def _note(suite: Suite, part: str, row: dict) -> None:
  suite.found[part].append(row)
  with open(os.path.join(suite.out, FILE), 'a', newline='') as file:
    _append(file, part, row)


def _append(file: TextIO, part: str, row: dict) -> None:
  csv.writer(file).writerows(
    (part, row['what'], k, v) for k, v in row.items() if k != 'what'
  )


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
  """TimeoutError after so long, as soon as Python has its turn again."""

  def stop(*unused) -> None:
    raise TimeoutError(f'stopped after {seconds:.0f} s')

  before = signal.signal(signal.SIGALRM, stop)
  others = signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    # Another's alarm, say that of a test, is only put off.
    signal.setitimer(signal.ITIMER_REAL, *others)
    signal.signal(signal.SIGALRM, before)


def _after(end: dict) -> str:
  return f', after {end["seconds"]:.0f} s' if 'seconds' in end else ''


def _page(suite: Suite) -> Page:
  """A table of each part."""
  sections, broken = [], []
  found = {name: suite.found[name] for name in PARTS if name in suite.found}
  for name, rows in found.items():
    *measured, end = rows
    if 'status' not in end:  # killed while it ran
      measured, end = rows, {'status': 'cut off'}
    if end['status'] != 'finished':
      broken.append(name)
    blank = dict.fromkeys((k for row in measured for k in row), '')
    cells = [blank | row for row in tables.cells(measured)]
    sections.append(
      Section(
        title=f'{name}: {PARTS[name][1].__doc__.splitlines()[0]}',
        text=[f'{end["status"]}{_after(end)}.'],
        table=Table.of(cells) if cells else None,
      )
    )
  done = len(sections) - len(broken)
  answer = Answer(
    'Did all parts finish?',
    f'{done} of {len(PARTS)}',
    f'Not finished: {", ".join(broken)}.' if broken else 'None is missing.',
  )
  return Page('Accelerator suite', mesh_lib.describe(), [answer], sections)
