# SPDX-License-Identifier: Apache-2.0
"""Parses command lines of this package as the commands themselves would.

    echo '[["drnet_jax", "predict", "--workdir=runs/x", "a.png"]]' | \\
        python tests/parse_commands.py

Prints a line for each: nothing if its flags exist and its config loads, else
what is wrong. Every command is parsed in a process of its own, since commands
may define flags of one name.
"""

import contextlib
import importlib
import io
import json
import os
import sys

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.errors import UserError
from drnet_jax.report import figures  # noqa: F401
from drnet_jax.run import train
from drnet_jax.serve import compiled  # noqa: F401  (imported once, for all)


def mistake(arguments: list[str]) -> str:
  """What is wrong with a command line: '' if nothing."""
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


def main() -> None:
  for arguments in json.load(sys.stdin):
    sys.stdout.flush()
    if not (child := os.fork()):
      print(json.dumps(mistake(arguments)))
      sys.stdout.flush()
      os._exit(0)
    os.waitpid(child, 0)


if __name__ == '__main__':
  main()
