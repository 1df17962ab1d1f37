# SPDX-License-Identifier: Apache-2.0
"""Processes that have imported everything when they begin, for tests.

They are children of one process, Python's forkserver, which imports this file:
what a command imports takes longer than most of what tests ask of it.
"""

import multiprocessing
import os
import sys
from unittest import mock

import jax

# No modules of commands: those define their flags when they are run.
from drnet_jax.commands import cli  # noqa: F401
from drnet_jax.report import plots  # noqa: F401
from drnet_jax.run import evaluate, train  # noqa: F401
from drnet_jax.serve import compiled  # noqa: F401


def own_cache(folder) -> dict[str, str]:
  """Environment of processes that keep all that they compile in a folder."""
  return {
    'JAX_COMPILATION_CACHE_DIR': str(folder),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
  }


def start(target, *arguments, **environment) -> multiprocessing.Process:
  """Starts a function in a process of its own, its environment changed so."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([__name__])
  process = context.Process(
    target=_begin, args=(os.environ | environment, target, arguments)
  )
  # Python 3.11 does not tell the server where modules are, and what it does not
  # find it leaves out in silence.
  with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
    process.start()
  return process


def _begin(environment, target, arguments) -> None:
  os.environ.clear()
  os.environ |= environment
  # What JAX read of the server's environment.
  for name in own_cache(''):
    if value := environment.get(name):
      default = getattr(jax.config, name.lower())
      kind = str if default is None else type(default)
      jax.config.update(name.lower(), kind(value))
  target(*arguments)
