# SPDX-License-Identifier: Apache-2.0
"""Experiment sets: what runs, in which order, and what becomes of failures."""

import json
import os
import pathlib
import sys

import pytest
from test_run import command, metrics

from drnet_jax import processes
from drnet_jax.commands import sweep
from drnet_jax.errors import UserError
from drnet_jax.report.paper_tables import TABLES

SETS = sorted(pathlib.Path(__file__).parents[1].glob('configs/sets/*.py'))

SET = """
from configs import smoke

TITLE, TABLES = 'Two targets and a fixed size', ()
ROWS = {'low': 0.0001, 'high': 0.0004, 'fixed': None}
ALIASES = {'the same': 'high'}


def get_config(row):
  config = smoke.get_config()
  for stage in (config.pretrain, config.finetune):
    stage.epochs = 1
  if ROWS[row] is None:
    config.stages = ('pretrain',)
    config.model.resolutions = (64,)
  else:
    config.finetune.objective.target_gmacs = ROWS[row]
  return config
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'a_set.py'
  path.write_text(SET)
  return str(path)


def test_rows_share_a_first_stage(file):
  first, low, high, fixed = sweep.plan(file, 'out', ['--config.seed=3'])
  assert first.workdir == 'out/first_stage/low' and first.needs is None
  assert "--config.stages=('pretrain',)" in first.arguments
  for row in (low, high):
    assert row.needs is first
    assert "--config.stages=('finetune',)" in row.arguments
    assert '--config.init_from=out/first_stage/low' in row.arguments
    assert '--config.reset_head=False' not in row.arguments  # it is so
  assert fixed.arguments == (
    f'--config={file}:fixed',
    '--workdir=out/fixed',
    '--config.seed=3',
  )
  assert all('--config.seed=3' in j.arguments for j in (first, low, high))


def test_a_head_is_fitted_in_the_first_stage_alone(file):
  path = pathlib.Path(file)
  changed = '  config.reset_head = True\n  return config'
  path.write_text(path.read_text().replace('  return config', changed))
  _, low, *_ = sweep.plan(file, 'out', [])
  assert '--config.reset_head=False' in low.arguments


def test_weights_to_begin_with_are_given_where_no_stage_is_shared(file):
  given = ['--config.init_from=weights.npz']
  with pytest.raises(UserError, match='init_from is set by the sweep'):
    sweep.plan(file, 'out', given)
  photos = next(str(path) for path in SETS if path.stem == 'photos')
  jobs = sweep.plan(photos, 'out', given)
  assert len(jobs) == 7
  assert all(job.arguments[-1:] == tuple(given) for job in jobs)


@pytest.mark.parametrize('path', SETS, ids=lambda path: path.stem)
def test_sets_fill_the_tables_of_the_paper(path):
  module = sweep._load(str(path))
  rows = {*module.ROWS, *getattr(module, 'ALIASES', {})}
  for number in module.TABLES:
    # Other people's networks in Table 4, and a mean.
    others = {'SSS', 'Versatile', 'PFP-A', 'C-SGD70', 'random mean'}
    assert rows >= TABLES[number].rows.keys() - others
  jobs = sweep.plan(str(path), 'out', [])
  assert {j.name for j in jobs} >= set(module.ROWS)
  # No first stage twice: those that are left alone differ.
  needed = [j.needs for j in jobs if j.needs]
  assert all(needed.count(job) > 1 for job in needed)


class Fake(sweep.Job):
  """A job whose command notes its name, or fails."""

  @property
  def command(self):
    script = 'import sys; open(sys.argv[1], "a").write(sys.argv[2] + "\\n")'
    if self.arguments:
      return [sys.executable, '-c', *self.arguments]
    log = os.path.join(os.path.dirname(self.workdir), 'log')
    return [sys.executable, '-c', script, log, self.name]


@pytest.fixture
def jobs(tmp_path):
  def job(name, *arguments, needs=None):
    return Fake(name, str(tmp_path / name), arguments, needs)

  first = job('first')
  broken = job('broken', 'import sys; sys.exit(2)')
  return [
    first,
    job('a', needs=first),
    broken,
    job('b', needs=broken),
    job('c', needs=first),
  ]


def log(jobs):
  path = pathlib.Path(jobs[0].workdir).parent / 'log'
  return path.read_text().split()


def test_a_failure_stops_only_what_needs_it(jobs):
  with pytest.raises(UserError, match=r'not done: broken \(.*; b \('):
    sweep.sweep(jobs)
  assert log(jobs) == ['first', 'a', 'c']
  assert [j.is_done() for j in jobs] == [True, True, False, False, True]
  with pytest.raises(UserError):
    sweep.sweep(jobs)
  assert log(jobs) == ['first', 'a', 'c']  # nothing is done twice


@pytest.mark.parametrize(
  'script',
  [
    'import sys; sys.exit(75)',
    'import os, signal; os.kill(os.getpid(), signal.SIGTERM)',
  ],
  ids=['saved', 'too early to save'],
)
def test_a_signal_stops_all_rows(jobs, script):
  stopped = Fake('d', jobs[0].workdir.replace('first', 'd'), (script,), None)
  with pytest.raises(processes.Stopped, match='stopped by SIGTERM at d'):
    sweep.sweep([stopped, *jobs])
  assert not stopped.is_done() and not os.path.exists(jobs[0].workdir)


def test_what_another_process_is_at_is_left_to_it(jobs, monkeypatch):
  first, a, _, _, c = jobs
  sweep.sweep([first])
  # A lock belongs to an opened file: this is as good as another process.
  with a.claimed() as mine:
    assert mine
    monkeypatch.setattr(sweep.time, 'sleep', lambda _: a.record(done=True))
    sweep.sweep([first, a, c])
  assert log(jobs) == ['first', 'c']


def test_other_arguments_are_refused(jobs):
  sweep.sweep(jobs[:1])
  other = Fake('first', jobs[0].workdir, ('--config.seed=1',))
  with pytest.raises(UserError, match='was begun with .* another --workdir'):
    sweep.sweep([other])


@pytest.mark.parametrize(
  'override', ['8', '--config.seed', "--config.stages=('finetune',)"]
)
def test_overrides_that_break_the_rows_are_refused(file, override):
  with pytest.raises(UserError, match='not of the form|set by the sweep'):
    sweep.plan(file, 'out', [override])


@pytest.mark.parametrize(
  'name, message',
  [('low, high', 'comma'), ('first_stage', 'reserved'), ('lo w', 'duplicated')],
)
def test_names_that_would_be_mistaken_are_refused(tmp_path, name, message):
  path = tmp_path / 'a_set.py'
  path.write_text(
    SET.replace("'high': 0.0004", f"'lo_w': 0.0004, '{name}': 0.0003")
  )
  with pytest.raises(UserError, match=message):
    sweep.plan(str(path), 'out', [])


@pytest.mark.slow
@pytest.mark.soak
def test_a_row_is_what_one_run_gives(file, data_dir, tmp_path):
  out = str(tmp_path / 'out')
  data = f'--config.data.data_dir={data_dir}'
  folder = f'--workdir={out}'
  done = command('sweep', f'--set={file}', folder, '--only=low', data)
  assert done.returncode == 0, done.stderr
  whole = str(tmp_path / 'whole')
  done = command('main', f'--config={file}:low', f'--workdir={whole}', data)
  assert done.returncode == 0, done.stderr
  ours = metrics(f'{out}/first_stage/low') + metrics(f'{out}/low')
  assert ours == metrics(whole)
  with open(f'{out}/set.json') as opened:
    listed = json.load(opened)
  assert listed['rows'] == {
    'low': 'low',
    'high': 'high',
    'fixed': 'fixed',
    'the same': 'high',
  }
