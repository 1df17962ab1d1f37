# SPDX-License-Identifier: Apache-2.0
"""Large pages: asked for once, and where they are of use."""

import os
import subprocess
import sys

import pytest

from drnet_jax import memory

COMMAND = """
import resource, sys
from drnet_jax import memory
memory.use_large_pages()
import jax, jax.numpy as jnp
double = jax.jit(lambda x: x * 2)
x = jnp.ones((25, 1024, 1024))  # 100 MiB
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  double(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, sys.argv[1:])
"""


def page_faults(path, **environment) -> int:
  """Of a product of 100 MiB, the third time."""
  path.write_text(COMMAND)
  done = subprocess.run(
    [sys.executable, path, 'a', '--b=c d'],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  faults, arguments = done.stdout.split(maxsplit=1)
  assert arguments.strip() == str(['a', '--b=c d'])
  return int(faults)


@pytest.mark.skipif(
  not memory._are_for_who_asks(), reason='no large pages for who asks here'
)
def test_a_command_begins_again_in_large_pages(tmp_path, monkeypatch):
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  small = page_faults(tmp_path / 'a.py', GLIBC_TUNABLES=f'{memory._TUNABLE}=0')
  assert small > 20_000  # of 4 KiB
  assert page_faults(tmp_path / 'b.py') < small / 20


@pytest.mark.parametrize(
  'kernel, told, begun',
  [
    ('always [madvise] never', '', 'glibc.malloc.hugetlb=1'),
    (
      'always [madvise] never',
      'glibc.malloc.arena_max=2',
      'glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1',
    ),
    ('always [madvise] never', 'glibc.malloc.hugetlb=0', None),
    ('[always] madvise never', '', None),
    ('always madvise [never]', '', None),
    (None, '', None),
  ],
)
def test_a_command_begins_again_only_where_it_is_of_use(
  tmp_path, monkeypatch, kernel, told, begun
):
  monkeypatch.setenv('GLIBC_TUNABLES', told)
  monkeypatch.setattr(memory, '_OF_KERNEL', tmp_path / 'enabled')
  monkeypatch.setattr(memory.importlib.util, 'find_spec', lambda name: None)
  if kernel:
    (tmp_path / 'enabled').write_text(kernel)
  found = []
  monkeypatch.setattr(
    os, 'execv', lambda *_: found.append(os.environ['GLIBC_TUNABLES'])
  )
  memory.use_large_pages()
  assert found == [begun] * bool(begun)


def test_beside_an_accelerator_nothing_begins_again(tmp_path, monkeypatch):
  monkeypatch.setenv('GLIBC_TUNABLES', '')
  monkeypatch.setattr(memory, '_OF_KERNEL', tmp_path / 'enabled')
  (tmp_path / 'enabled').write_text('always [madvise] never')
  monkeypatch.setattr(
    memory.importlib.util, 'find_spec', lambda name: name == 'libtpu' or None
  )
  monkeypatch.setattr(os, 'execv', pytest.fail)
  memory.use_large_pages()
