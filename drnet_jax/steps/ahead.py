# SPDX-License-Identifier: Apache-2.0
"""Compiles the programs of a step ahead of the first one, several at a time."""

import concurrent.futures
import os
import time
from collections.abc import Callable
from typing import Any

import jax

from drnet_jax import terminal

_CACHE_HIT = '/jax/compilation_cache/cache_hits'

# In place of a random key.
KEY = jax.eval_shape(jax.random.key, 0)


class Program:
  """`jax.jit`, with what has been compiled ahead kept at hand.

  Args:
    function: to compile.
    num_static: how many arguments, from the left, are static.
    **options: of `jax.jit`.
  """

  def __init__(self, function: Callable, *, num_static: int = 0, **options):
    self._num_static = num_static
    self._jit = jax.jit(
      function, static_argnums=tuple(range(num_static)), **options
    )
    self._compiled = {}

  def __call__(self, *args):
    static, arrays = args[: self._num_static], args[self._num_static :]
    if static in self._compiled:
      return self._compiled[static](*arrays)
    return self._jit(*args)

  def trace(self, *args):
    """As of `jax.jit`; arrays may be `jax.ShapeDtypeStruct`s."""
    return self._jit.trace(*args)

  def keep(self, args, compiled) -> None:
    """Takes note of what `trace(*args).lower().compile()` returned."""
    self._compiled[args[: self._num_static]] = compiled


class Compiling:
  """A pool of threads that compile, with a progress bar and a line at the end.

  Python lowers the next program while XLA compiles the ones before. Leaving
  the context waits for all of them. The line says how many programs there were,
  how many of them lay in the persistent cache, and how long it took.

  Args:
    options: of XLA, by the names of its flags.

  Attributes:
    cached: programs that lay in the persistent cache.
  """

  def __init__(self, options: dict[str, Any] | None = None):
    self._options = options

  def __enter__(self) -> 'Compiling':
    self._start = time.perf_counter()
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    self._jobs = []
    self.cached = 0
    jax.monitoring.register_event_listener(self._count)
    return self

  def __call__(self, program: Program, *args) -> concurrent.futures.Future:
    """Has a program compiled for these arguments; returns its future."""
    lowered = program.trace(*args).lower()
    future = self._pool.submit(lowered.compile, self._options)
    self._jobs.append((program, args, future))
    return future

  def __exit__(self, *error) -> None:
    try:
      for program, args, future in terminal.progress(
        [] if any(error) else self._jobs, 'compile', leave=False
      ):
        program.keep(args, future.result())
    finally:
      self._pool.shutdown(cancel_futures=True)
      jax.monitoring.unregister_event_listener(self._count)
    if not any(error):
      seconds = time.perf_counter() - self._start
      terminal.say(
        f'compiled {len(self._jobs)} programs in {seconds:.1f} s, '
        f'{self.cached} of them from the cache'
      )

  def _count(self, event: str, **_) -> None:
    self.cached += event == _CACHE_HIT
