# SPDX-License-Identifier: Apache-2.0
"""The persistent cache of compiled programs: set, used by all, and told of."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMPILE = """
import jax
import jax.numpy as jnp
from drnet_jax import mesh, processes
from drnet_jax.commands import cli
from drnet_jax.steps import ahead

cli.set_up()
processes.join(peer_timeout_s=20)
everywhere = mesh.replicated(mesh.create())
x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=everywhere)
program = ahead.Program(lambda x: jnp.tanh(x @ x), out_shardings=everywhere)
with ahead.Compiling() as compiling:
  compiling(program, x)
print('found', compiling.cached)
"""


def compile_in_two(folder, **environment):
  """What each of two processes prints, which may do so at the same moment."""
  done = subprocess.run(
    [
      *(ROOT / 'launch' / 'local.sh', '--devices', '1', '2'),
      *('sh', '-c', '"$@" >"$0/$JAX_PROCESS_ID"', folder),
      *(sys.executable, '-c', COMPILE),
    ],
    env=os.environ | {'PYTHONPATH': str(ROOT)} | environment,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert not done.returncode, done.stderr
  return [(folder / name).read_text() for name in '01']


def test_the_cache_is_set_though_jax_is_imported_before(tmp_path):
  environment = {k: v for k, v in os.environ.items() if 'CACHE' not in k}
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      'import jax; from drnet_jax.commands import cli; cli.set_up(); '
      'print(jax.config.jax_compilation_cache_dir)',
    ],
    env=environment | {'HOME': str(tmp_path), 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.stdout.strip() == str(tmp_path / '.cache/drnet_jax/compiled')


@pytest.mark.slow
def test_processes_use_the_cache(tmp_path):
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
  }
  for text in compile_in_two(tmp_path, **cache):
    assert text.endswith('found 0\n')
  first, _ = compile_in_two(tmp_path, **cache)
  # JAX's key holds the topology, which CPUs of two processes do not share; all
  # else in it is equal. So only the process that writes finds its programs.
  assert first.endswith('found 1\n')
  assert 'compiled 1 programs in' in first
  assert '1 of them from the cache' in first
