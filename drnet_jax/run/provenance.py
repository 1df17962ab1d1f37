# SPDX-License-Identifier: Apache-2.0
"""What a number was made with: command, commit, device, versions, date."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys

import jax


def now() -> dict[str, str]:
  """Command, commit, device and versions of this process, and the time."""
  return {
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': shlex.join(['python', *sys.orig_argv[1:]]),
    'commit': commit(),
    'device': device(),
    'versions': f'Python {platform.python_version()}, jax {jax.__version__}',
  }


def commit() -> str:
  """Commit of the checkout that the code runs from; else its version."""
  folder = os.path.dirname(os.path.abspath(__file__))
  # A package installed into somebody's checkout is none of its files.
  if _git(folder, 'ls-files', os.path.basename(__file__)):
    return _git(folder, 'describe', '--always', '--dirty', '--exclude=*')
  try:
    return f'version {importlib.metadata.version("drnet_jax")}'
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'


def device() -> str:
  """What JAX runs on: '4 x NVIDIA H100', '1 x cpu (Intel ..., 2 cores)'."""
  kind = jax.devices()[0].device_kind
  if jax.default_backend() == 'cpu':
    kind += f' ({_processor()}, {os.cpu_count()} cores)'
  return f'{jax.device_count()} x {kind}'


def _git(folder: str, *arguments: str) -> str:
  """What git prints, or '' where there is no git or no repository."""
  try:
    done = subprocess.run(
      ['git', '-C', folder, *arguments],
      capture_output=True,
      text=True,
      timeout=10,
    )
  except (OSError, subprocess.TimeoutExpired):
    return ''
  return done.stdout.strip() if done.returncode == 0 else ''


def _processor() -> str:
  with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
    for line in file:
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()
