# SPDX-License-Identifier: Apache-2.0
"""Large pages for commands that train on CPUs.

On CPUs XLA takes the memory of each step afresh and gives it back after. The
kernel then clears it page by page, which with pages of 4 KiB takes a quarter of
the time of a step that needs gigabytes; with pages of 2 MiB it hardly counts.
"""

import importlib.util
import os
import pathlib
import sys

_OF_KERNEL = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
_TUNABLE = 'glibc.malloc.hugetlb'


def use_large_pages() -> None:
  """Starts this command again, in memory of large pages.

  The C library has to be told before it begins, so call this before anything
  that takes long. Returns if it has been told, or if that would be of no use:
  beside an accelerator, and where the kernel does not give such pages on
  request (or gives them to all).
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if _TUNABLE in tunables or not sys.executable:
    return
  accelerators = map(importlib.util.find_spec, ('jax_plugins', 'libtpu'))
  if any(accelerators) or not _are_for_who_asks():
    return
  os.environ['GLIBC_TUNABLES'] = f'{tunables}:{_TUNABLE}=1'.lstrip(':')
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _are_for_who_asks() -> bool:
  try:
    return '[madvise]' in _OF_KERNEL.read_text()
  except OSError:
    return False
