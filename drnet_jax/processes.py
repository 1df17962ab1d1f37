# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: joining them, and what only one of them may do.

One process drives the devices of one host (or one GPU). All run the same
program on the same workdir; process 0, the *main* one, writes what is read by
people. Everything between them is JAX's own distributed runtime.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from drnet_jax.errors import UserError

# Exit statuses of a run that should be started again, on all its processes, and
# then goes on: after SIGTERM (state saved), and when another process was lost.
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
LOST_PEER = 76
# Of one that a person has stopped.
INTERRUPTED = 128 + signal.SIGINT

# What launchers that JAX may not know tell of the number of processes.
_SIZES = ('JAX_NUM_PROCESSES', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE')
_RANKS = ('JAX_PROCESS_ID', 'OMPI_COMM_WORLD_RANK', 'PMI_RANK')

# In the words of JAX, which raises more than one type.
_SIGNS_OF_LOSS = (
  'Gloo',
  'NCCL',
  'closed by peer',
  'oordination',
  'heartbeat',
)

_LONGEST_WAIT_MS = 2 * 3600 * 1000  # for instance while data is prepared
_waits = itertools.count()
_asked = itertools.count(1)

_terminated = False
_interrupted = False


class Stopped(Exception):
  """A run was asked to stop, and has saved its state; the text says where."""

  def __init__(self, where: str):
    by = 'Ctrl-C' if _interrupted else 'SIGTERM'
    super().__init__(f'stopped by {by} {where}')
    self.status = INTERRUPTED if _interrupted else PREEMPTED


def join(*, peer_timeout_s: int) -> None:
  """Joins the other processes of this run, if the environment names any.

  Cloud TPU, GKE, SLURM and Open MPI 4 are found by JAX. Elsewhere set
  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID; under any MPI the first is enough. To be called before
  anything else of JAX.

  Args:
    peer_timeout_s: when a process has not been heard of for so long, all stop.

  Raises:
    UserError: the environment names several processes, but not how to meet.
  """
  size, rank = _first_of(_SIZES), _first_of(_RANKS)
  timeouts = {
    'heartbeat_timeout_seconds': peer_timeout_s,
    'shutdown_timeout_seconds': peer_timeout_s,
  }
  if 'JAX_COORDINATOR_ADDRESS' in os.environ:
    if size is None or rank is None:
      raise UserError(
        'JAX_COORDINATOR_ADDRESS is set, but not JAX_NUM_PROCESSES and '
        'JAX_PROCESS_ID'
      )
    jax.distributed.initialize(
      num_processes=size,
      process_id=rank,
      cluster_detection_method='deactivate',
      **timeouts,
    )
    return
  try:
    jax.distributed.initialize(**timeouts)
  except ValueError as error:
    # JAX knows of no cluster here. Each of several processes would train alone.
    if size is not None and size > 1:
      raise UserError(
        f'this is one of {size} processes, but JAX does not know how to meet '
        'the others: set JAX_COORDINATOR_ADDRESS=<host of process 0>:<port>'
      ) from error


def _first_of(names: tuple[str, ...]) -> int | None:
  return next((int(os.environ[n]) for n in names if n in os.environ), None)


@contextlib.contextmanager
def signals_noted(
  pass_on: Callable[[int], None] | None = None,
) -> Iterator[None]:
  """SIGTERM, or Ctrl-C once, is told by `should_stop` and ends nothing else.

  A second Ctrl-C ends this process at once.

  Args:
    pass_on: called with SIGTERM where either comes, for a child.
  """
  global _terminated, _interrupted
  _terminated = _interrupted = False
  several = jax.process_count() > 1

  def note(number: int, _) -> None:
    global _terminated, _interrupted
    if number == signal.SIGINT:
      if _interrupted:
        _end_at_once()
      _interrupted = True
      if several:  # JAX knows of SIGTERM, and tells the other processes
        signal.raise_signal(signal.SIGTERM)
        return
    _terminated = True
    if pass_on:
      pass_on(signal.SIGTERM)

  numbers = [signal.SIGINT]
  if not several:  # else as JAX has it from `join` on
    numbers.append(signal.SIGTERM)
  before = {number: signal.signal(number, note) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _end_at_once() -> None:
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(INTERRUPTED)


def was_stopped() -> bool:
  """Whether a signal has been noted in this process."""
  return _terminated


def should_stop() -> bool:
  """Whether all processes are to save what they have, and stop.

  True soon after any of them got SIGTERM or Ctrl-C, the same on all, and from
  then on.
  All must ask equally often: before a stage and after each of its steps.
  """
  global _terminated
  # JAX has them agree on the number that the furthest of them asks for next,
  # and says yes to no other. So numbers must follow one another without a gap,
  # also over stages and where a run goes on: steps would not do.
  # (And no `|=`: a signal that came meanwhile would be written over.)
  if multihost_utils.reached_preemption_sync_point(next(_asked)):
    _terminated = True
  return _terminated


def exit_if_peer_was_lost(error: BaseException | None) -> None:
  """Ends this process if an error, or one behind it, says another is gone.

  At once, not through Python's exit: that would wait for the other.
  """
  if jax.process_count() == 1:
    return
  while error is not None:
    if any(sign in str(error) for sign in _SIGNS_OF_LOSS):
      print(
        f'error: process {jax.process_index()} has lost another one, whose '
        f'output tells more ({str(error).splitlines()[0]}). Run the same '
        'command again on all: it goes on from the latest checkpoint.',
        file=sys.stderr,
        flush=True,
      )
      os._exit(LOST_PEER)
    error = error.__cause__ or error.__context__


def is_main() -> bool:
  """Whether this process writes files and the console."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns once every process has come to this place.

  Through JAX's coordination service, not the devices: collectives give up when
  one process is half a minute late.
  """
  # A key may be waited for but once.
  key = f'{name} {next(_waits)}'
  multihost.get_barrier_sync_fn()(key=key, timeout_ms=_LONGEST_WAIT_MS)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
  """The main process does something alone, and then the others do it."""
  if not is_main():
    wait_for_all(name)
  yield
  if is_main():
    wait_for_all(name)


def gather(value: Any) -> list[Any]:
  """A value (anything that pickles) of every process, in their order."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.pad(data, (0, int(sizes.max()) - len(data)))
  rows = multihost_utils.process_allgather(padded)
  return [
    pickle.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]
