# SPDX-License-Identifier: Apache-2.0
"""Compiles the programs of a step ahead of the first one, several at a time."""

import concurrent.futures
import os
import time
from collections.abc import Callable

import jax

from drnet_jax import terminal

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

  def lower(self, *args):
    """As of `jax.jit`; arrays may be `jax.ShapeDtypeStruct`s."""
    return self._jit.lower(*args)

  def keep(self, args, compiled) -> None:
    """Takes note of what `lower(*args).compile()` returned."""
    self._compiled[args[: self._num_static]] = compiled


class Compiling:
  """A pool of threads that compile, with a progress bar and a line at the end.

  Python lowers the next program while XLA compiles the ones before. Leaving
  the context waits for all of them.
  """

  def __enter__(self) -> 'Compiling':
    self._start = time.perf_counter()
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    self._jobs = []
    return self

  def __call__(self, program: Program, *args) -> concurrent.futures.Future:
    """Has a program compiled for these arguments; returns its future."""
    future = self._pool.submit(program.lower(*args).compile)
    self._jobs.append((program, args, future))
    return future

  def __exit__(self, *error) -> None:
    with self._pool:
      if any(error):
        return
      for program, args, future in terminal.progress(
        self._jobs, 'compile', leave=False
      ):
        program.keep(args, future.result())
    seconds = time.perf_counter() - self._start
    if seconds > 5:
      count = len(self._jobs)
      terminal.say(f'compiled {count} programs in {seconds:.0f} s')
