# SPDX-License-Identifier: Apache-2.0
"""Parses command lines of this package as the commands themselves would.

Every command is parsed in a process of its own, since commands may define flags
of one name.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile

import forked
from absl import flags

from drnet_jax.commands import cli
from drnet_jax.errors import UserError
from drnet_jax.run import train


def mistakes(commands, *, cwd) -> list[str]:
  """What is wrong with each command line, given in a folder: '' if nothing.

  That is, whether its flags exist and its config loads.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = os.path.join(folder, 'said')
    process = forked.start(_parse_all, commands, str(cwd), file)
    process.join()
    assert process.exitcode == 0
    with open(file) as said:
      return [json.loads(line) for line in said]


def _parse_all(commands, cwd, file) -> None:
  os.chdir(cwd)
  sys.path.append(cwd)
  for words in commands:
    if not (child := os.fork()):
      with open(file, 'a') as said:
        print(json.dumps(_mistake(words)), file=said)
      os._exit(0)
    os.waitpid(child, 0)


def _mistake(arguments: list[str]) -> str:
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      name, *rest = arguments
      if name == 'drnet_jax':
        verb, *rest = rest
        name = f'drnet_jax.commands.{verb}'
      sys.argv = [name, *rest]  # where ml_collections looks for overrides
      module = importlib.import_module(name)
      getattr(module, 'parse_flags', cli.parse_flags)(sys.argv)
      if 'config' in flags.FLAGS and flags.FLAGS['config'].present:
        train.read(cli.read_config(flags.FLAGS.config))
  except SystemExit:
    return said.getvalue()
  except (UserError, ImportError, AttributeError) as error:
    return str(error)
  return ''
