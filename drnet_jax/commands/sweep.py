# SPDX-License-Identifier: Apache-2.0
"""Runs the rows of an experiment set, each in its own workdir.

    python -m drnet_jax sweep --set=configs/sets/in100.py \\
        --workdir=runs/in100 --config.data.data_dir=/data/imagenet

`--workdir` is the folder that the rows' workdirs are made in.

A set is a config file whose `get_config` takes the name of a row. It lists the
rows in ROWS, and says in TITLE what they are and in TABLES which of the paper's
tables they fill (ALIASES: other names of theirs there).
`--config.<field>=<value>` goes to every row. Rows that share their first stage
train it once.

Run the same command again to resume where it stopped. Several at once on one
folder divide the rows among them, for instance one per GPU with
CUDA_VISIBLE_DEVICES: each takes the next free row. A row that fails is
reported; the others still run. At the end, and by `python -m drnet_jax report
--workdir=<the folder>` at any time, the rows that are done become one report.
"""

import collections
import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import IO

import ml_collections
from absl import flags

from drnet_jax import settings
from drnet_jax.commands import cli
from drnet_jax.errors import PREEMPTED, UserError

_SET = flags.DEFINE_string(
  'set', None, 'File of the set, e.g. configs/sets/in100.py.'
)
_ONLY = flags.DEFINE_list('only', [], 'Names of the rows to run; default all.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Only print the commands.')

# The second: it ended before it noted signals, with nothing to save yet.
_STOPPED = (PREEMPTED, -signal.SIGTERM)
_POLL_S = 5  # between looks at what other sweeps of the folder run


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of `drnet_jax.main`.

  It is named as its row, or the first stage that rows share; `needs` is the job
  whose weights it begins with.
  """

  name: str
  workdir: str
  arguments: tuple[str, ...]
  needs: 'Job | None' = None

  @property
  def command(self) -> list[str]:
    return [sys.executable, '-m', 'drnet_jax.main', *self.arguments]

  def is_done(self) -> bool:
    """Whether it has been run to its end.

    Raises:
      UserError: it has, or it was begun, with other arguments.
    """
    try:
      with open(self._record) as file:
        record = json.load(file)
    except FileNotFoundError:
      return False
    from drnet_jax.run.workdir import FREE, REMEDIES

    # Whether it takes such a change when it is resumed, a run checks itself.
    free = FREE + (() if record['done'] else REMEDIES)

    def bound(arguments: Sequence[str]) -> list[str]:
      fields = [a.partition('=')[0].removeprefix('--') for a in arguments]
      pairs = zip(arguments, fields, strict=True)
      return [a for a, field in pairs if not settings.matches(field, free)]

    if bound(record['arguments']) != bound(self.arguments):
      raise UserError(
        f'{self.workdir} was begun with {shlex.join(record["arguments"])}, now '
        f'it is {shlex.join(self.arguments)}. Choose another --workdir.'
      )
    return record['done']

  def record(self, *, done: bool) -> None:
    fields = {'arguments': self.arguments, 'done': done}
    settings.write_json(self._record, fields)

  @contextlib.contextmanager
  def claimed(self) -> Iterator[IO | None]:
    """Holds the job by a file, open; yields None where another sweep does."""
    os.makedirs(self.workdir, exist_ok=True)
    with open(os.path.join(self.workdir, 'sweep.lock'), 'w') as file:
      try:
        # The system frees it when all who have it open have ended.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        yield None
      else:
        yield file

  @property
  def _record(self) -> str:
    return os.path.join(self.workdir, 'sweep.json')


def plan(path: str, out: str, overrides: Sequence[str]) -> list[Job]:
  """The runs that fill a set, shared first stages before those that need them.

  `path` is the set's file, `out` the folder of the workdirs; overrides,
  '--config.<field>=<value>', are for every run.

  Raises:
    UserError: the file is not a set, or the overrides cannot apply to all runs.
  """
  given = [override.partition('=')[0] for override in overrides]
  for field, override in zip(given, overrides, strict=True):
    if not override.startswith('--config.') or field == override:
      raise UserError(
        f'{override!r} is not of the form --config.<field>=<value>'
      )
    if field == '--config.stages':
      raise UserError(f'{field} is set by the sweep; edit the set file')
  configs = _rows(path)
  keys = {name: _first_stage(config) for name, config in configs.items()}
  uses = collections.Counter(key for key in keys.values() if key)
  if uses.total() > len(uses) and '--config.init_from' in given:
    raise UserError(
      '--config.init_from is set by the sweep, for rows that share their first '
      'stage; edit the set file'
    )

  def arguments(row: str, workdir: str, *fields: str) -> tuple[str, ...]:
    flag = f'--config={path}:{row}'
    return (flag, f'--workdir={workdir}', *fields, *overrides)

  shared: dict[str, Job] = {}
  jobs = []
  for name, config in configs.items():
    key, workdir = keys[name], os.path.join(out, _slug(name))
    first, fields = None, ()
    if uses[key] > 1:
      if key not in shared:
        folder = os.path.join(out, 'first_stage', _slug(name))
        only_first = arguments(name, folder, _stages_flag(config.stages[:1]))
        shared[key] = Job(f'first stage of {name!r}', folder, only_first)
        jobs.append(shared[key])
      first = shared[key]
      fields = (
        _stages_flag(config.stages[1:]),
        f'--config.init_from={first.workdir}',
        *(['--config.reset_head=False'] if config.get('reset_head') else ()),
      )
    jobs.append(Job(name, workdir, arguments(name, workdir, *fields), first))
  return jobs


def sweep(jobs: Sequence[Job]) -> None:
  """Runs the jobs that are not done, but for those that other sweeps run.

  Raises:
    UserError: some failed; the others are done.
    Stopped: SIGTERM or Ctrl-C stopped the run at hand, its state is saved.
  """
  failed: list[Job] = []
  while left := [j for j in jobs if j not in failed and not j.is_done()]:
    ready = [j for j in left if j.needs is None or j.needs.is_done()]
    lost = [j for j in left if j.needs in failed]
    failed += lost
    for job in ready:
      status = _run(job)
      if status is not None:
        failed += [job] if status else []
        break
    else:
      if not lost:
        time.sleep(_POLL_S)  # other sweeps run all of them
  if failed:
    raise UserError(
      'not done: '
      + '; '.join(f'{j.name} ({shlex.join(j.command)})' for j in failed)
    )


def _run(job: Job) -> int | None:
  """Runs a job to its end; its exit status, None if another sweep runs it."""
  from drnet_jax import processes, terminal

  with job.claimed() as lock:
    if lock is None:
      return None
    if job.is_done():
      return 0
    job.record(done=False)
    terminal.say(f'\n{job.name}: {job.workdir}')
    # With the file: a child that outlives this process still holds the job.
    child = subprocess.Popen(job.command, pass_fds=[lock.fileno()])
    with processes.signals_noted(child.send_signal):
      status = child.wait()
    if status == 0:
      job.record(done=True)
    if processes.was_stopped() or status in _STOPPED:
      raise processes.Stopped(
        f'at {job.name}; run the same command again to resume'
      )
    return status


def _load(path: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location('experiment_set', path)
  if spec is None:
    raise UserError(
      f'--set={path}: name a .py file, e.g. configs/sets/in100.py'
    )
  try:
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  except (AttributeError, OSError) as error:
    raise UserError(f'--set={path} cannot be read: {error}') from error
  for name in ('TITLE', 'TABLES', 'ROWS', 'get_config'):
    if not hasattr(module, name):
      raise UserError(f'--set={path} has no {name}; see configs/sets/')
  return module


def _rows(path: str) -> dict[str, ml_collections.ConfigDict]:
  module = _load(path)
  taken = collections.Counter(['first_stage', *map(_slug, module.ROWS)])
  for name in module.ROWS:
    if ',' in name:
      raise UserError(
        f'{path}: --only cannot name {name!r}, because of its comma'
      )
    if taken[_slug(name)] > 1:
      raise UserError(
        f'{path}: the row name {name!r} is reserved or duplicated'
      )
  return {name: module.get_config(name) for name in module.ROWS}


def _first_stage(config: ml_collections.ConfigDict) -> str | None:
  """What the weights of its first stage depend on, if other stages follow."""
  if len(config.stages) == 1:
    return None
  fields = settings.plain(config)
  for name in (*config.stages[1:], 'stages'):
    fields.pop(name, None)
  if config[config.stages[0]].step == 'pretrain':  # of the base network alone
    del fields['model']['predictor'], fields['model']['predictor_px']
  return json.dumps([config.stages[0], fields], sort_keys=True)


def _stages_flag(stages: Sequence[str]) -> str:
  return f'--config.stages={tuple(stages)}'


def _slug(name: str) -> str:
  return re.sub(r'[^\w.]+', '_', name)


def _list_rows(path: str, out: str, jobs: Sequence[Job]) -> None:
  """Writes the file by which the report finds the rows."""
  from drnet_jax.report import run_set

  module = _load(path)
  workdirs = {j.name: os.path.relpath(j.workdir, out) for j in jobs}
  rows = {name: workdirs[name] for name in module.ROWS}
  aliases = getattr(module, 'ALIASES', {})
  settings.write_json(
    os.path.join(out, run_set.FILE),
    {
      'title': module.TITLE,
      'tables': module.TABLES,
      'rows': rows | {name: rows[row] for name, row in aliases.items()},
    },
  )


def _selected(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
  known = [j.name for j in jobs]
  for name in names:
    if name not in known:
      raise UserError(f'--only={name} is not a row of the set; it has {known}')
  wanted = [j for j in jobs if not names or j.name in names]
  needed = [j.needs for j in wanted]
  return [j for j in jobs if j in wanted or j in needed]


def run(overrides: Sequence[str]) -> None:
  out = cli.workdir()
  import jax

  from drnet_jax import processes, terminal

  jax.config.update('jax_platforms', 'cpu')  # accelerators are for the rows

  if not _SET.value:
    raise UserError('--set is missing: name a file, e.g. configs/sets/in1k.py')
  jobs = plan(_SET.value, out, overrides)
  chosen = _selected(jobs, _ONLY.value)
  if _DRY_RUN.value:
    for job in chosen:
      print(shlex.join(['python', '-m', 'drnet_jax.main', *job.arguments]))
    return
  from drnet_jax.report import page, run_set, set_page

  for job in jobs:
    job.is_done()  # refuses a folder of other runs before anything is written
  os.makedirs(out, exist_ok=True)
  _list_rows(_SET.value, out, jobs)
  try:
    sweep(chosen)
  except processes.Stopped as stop:
    terminal.say(str(stop))
    sys.exit(stop.status)
  finally:
    rows = run_set.read(out)
    if any(rows.runs.values()):
      directory = os.path.join(out, 'report')
      set_page.write(rows, directory)
      terminal.say(f'Report: {os.path.join(directory, page.FILE)}')


parse_flags = cli.keep_overrides  # for the rows
