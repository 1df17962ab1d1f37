# SPDX-License-Identifier: Apache-2.0
"""Every command on every kind of spoilt run: it works, or says what is wrong.

In this process, so that it is quick: exit status 0 or 2, at most three lines
on stderr, and no traceback (which would be an exception here).
"""

import builtins
import errno
import io
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from test_trust import base, change, spoil, takes_over  # noqa: F401

from drnet_jax import settings
from drnet_jax.commands import calibrate, cli, export, predict, report
from drnet_jax.run import evaluate, train, workdir


def evaluated(path):
  evaluate.evaluate(path)


def resumed(path):
  train.train(workdir.read_config(path), path)


def command(module, *arguments, **flags):
  def call(path):
    found = [a.format(os.path.dirname(path)) for a in arguments]
    with flagsaver.flagsaver(workdir=path, **flags):
      module.run(found)

  return call


COMMANDS = {
  'evaluate': evaluated,
  'train': resumed,
  'calibrate': command(calibrate),
  'report': command(report),
  'predict': command(predict, '{}/photos/val/ant'),
  'export': command(export, to='/nowhere/to', check_images=2),
}


@pytest.fixture(scope='module')
def whole(base):  # noqa: F811
  """The run evaluated and calibrated."""
  path = str(base / 'run')
  evaluate.evaluate(path)
  cli.run_command(lambda: COMMANDS['calibrate'](path))
  return base


def empty_workdir(path, patch):
  del patch
  shutil.rmtree(path)
  path.mkdir()


def stale_record(path, patch):
  """Of a model of fewer sizes."""
  del patch
  file = path / 'report' / 'record.npz'
  fields = dict(np.load(file, allow_pickle=False))
  sizes = len(fields['gmacs'])
  for name, values in fields.items():
    if values.ndim and values.shape[-1] == sizes:  # the axis of the sizes
      fields[name] = values[..., :-1]
  np.savez(file, **fields)


def config_without(section):
  def spoil_config(path, patch):
    del patch
    config = settings.read_json(path / 'config.json')
    del config[section]
    settings.write_json(path / 'config.json', config)

  return spoil_config


def read_only(path, patch):
  """As a file system that is mounted so; chmod does not stop root."""

  def refuse(function, of=0):
    def call(*args, **kwargs):
      mode = args[1] if len(args) > 1 and function in opens else 'w'
      mode = kwargs.get('mode', mode)
      target = os.fspath(args[of]) if not isinstance(args[of], int) else ''
      if str(target).startswith(str(path)) and set(mode) & set('wax+'):
        raise OSError(errno.EROFS, 'Read-only file system', target)
      return function(*args, **kwargs)

    return call

  opens = (builtins.open,)
  for module in (builtins, io):
    patch.setattr(module, 'open', refuse(builtins.open))
  for name in ('mkdir', 'remove', 'unlink', 'rmdir'):
    patch.setattr(os, name, refuse(getattr(os, name)))
  patch.setattr(os, 'replace', refuse(os.replace, 1))


FAULTS = {
  'nothing': lambda path, patch: None,
  'no_data': lambda path, patch: shutil.rmtree(path.parent / 'photos'),
  'moved_data': lambda path, patch: (path.parent / 'photos').rename(
    path.parent / 'elsewhere'
  ),
  'other_classes': lambda path, patch: change(
    path.parent / 'photos', 'renamed'
  ),
  'read_only': read_only,
  'empty_workdir': empty_workdir,
  'damaged_checkpoint': lambda path, patch: spoil(path),
  'stale_record': stale_record,
  'config_without_data': config_without('data'),
  'config_without_model': config_without('model'),
}
# Of these a command makes all it promises; of the rest it says what is wrong.
WORKS = {
  *((name, 'nothing') for name in COMMANDS),
  ('evaluate', 'stale_record'),
  # From the record of these weights, which is there.
  ('report', 'no_data'),
  ('report', 'moved_data'),
  ('report', 'damaged_checkpoint'),
  ('report', 'other_classes'),
  # The classes are those of the checkpoint.
  ('predict', 'other_classes'),
}
# Not run: they take long, and these faults do not touch them.
LEFT_OUT = {
  ('train', 'nothing'),
  ('train', 'stale_record'),
  ('export', 'nothing'),
  ('export', 'stale_record'),
  ('predict', 'stale_record'),
}
CASES = [
  (name, fault)
  for name in COMMANDS
  for fault in FAULTS
  if (name, fault) not in LEFT_OUT
]


@pytest.mark.parametrize('name, fault', CASES)
def test_it_works_or_says_what_is_wrong(
  whole, tmp_path, monkeypatch, capsys, name, fault
):
  path = takes_over(whole, tmp_path)
  status = 0
  with monkeypatch.context() as patch:
    FAULTS[fault](path, patch)
    try:
      cli.run_command(lambda: COMMANDS[name](str(path)))
    except SystemExit as stop:
      status = stop.code
  lines = capsys.readouterr().err.splitlines()
  assert status in (0, 2) and len(lines) <= 3, (status, lines)
  assert not any('.partial' in line for line in lines), lines
  assert (status == 2) == (
    len([x for x in lines if x.startswith('error')]) == 1
  )
  assert (status == 0) == ((name, fault) in WORKS), lines


def test_python_that_leaves_out_assertions_is_refused():
  """Flax takes off its interceptors in one."""
  command = ['-m', 'drnet_jax.main', '--config=smoke', '--mode=describe']
  done = subprocess.run(
    [sys.executable, '-O', *command],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: python -O')
  assert done.stderr.count('\n') == 1
