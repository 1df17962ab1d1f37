# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: joining them, and what only one of them may do.

One process drives the devices of one host (or one GPU). All run the same
program on the same workdir; process 0, the *main* one, writes what is read by
people. Everything between them is JAX's own distributed runtime.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the key-value store has no public name
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from drnet_jax.errors import INTERRUPTED, PREEMPTED, UserError

# Exit status of a run to be started again on all its processes: one was lost.
LOST_PEER = 76

# What launchers that JAX may not know tell of the number of processes.
_SIZES = ('JAX_NUM_PROCESSES', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE')
_RANKS = ('JAX_PROCESS_ID', 'OMPI_COMM_WORLD_RANK', 'PMI_RANK')

# A connection that ended, in the words of JAX, Gloo and NCCL, which raise more
# than one type. Their names alone say nothing: they fail in other ways, too.
_SIGNS_OF_LOSS = re.compile(
  '(closed|reset) by (remote )?peer|broken pipe|remote process exited|heartbeat'
  '|coordination ?service|(gloo|nccl).*timed out',
  re.IGNORECASE,
)

# Key of what the first process to fail tells the others, and how soon they ask.
_FAILED = 'drnet_jax/failed'
_POLL_S = 1.0
_LONGEST_GOODBYE_S = 10
_leaving = threading.Lock()  # taken for good by the thread that ends it all
_done = threading.Event()

_LONGEST_WAIT_MS = 2 * 3600 * 1000  # for instance while data is prepared
_waits = itertools.count()
_asked = itertools.count(1)

_noted: set[int] = set()  # the signals that have come, see `signals_noted`


class Stopped(Exception):
  """A run was asked to stop, and has saved its state; the text says where."""

  def __init__(self, where: str):
    interrupted = signal.SIGINT in _noted
    by = 'Ctrl-C' if interrupted else 'SIGTERM'
    super().__init__(f'stopped by {by} {where}')
    self.status = INTERRUPTED if interrupted else PREEMPTED


def join(*, peer_timeout_s: int) -> None:
  """Joins the other processes of this run, if the environment names any.

  Cloud TPU, GKE, SLURM and Open MPI 4 are found by JAX. Elsewhere set
  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID; under any MPI the first is enough. To be called before
  anything else of JAX.

  When a process has not been heard of for `peer_timeout_s`, all stop.

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
    if rank >= size:
      raise UserError(
        f'this is process {rank} of {size} by the environment: they are '
        f'numbered from 0 to {size - 1} (JAX_PROCESS_ID, JAX_NUM_PROCESSES)'
      )
    jax.distributed.initialize(
      num_processes=size,
      process_id=rank,
      cluster_detection_method='deactivate',
      **timeouts,
    )
  else:
    try:
      jax.distributed.initialize(**timeouts)
    except ValueError as error:
      # JAX knows of no cluster. Each of several processes would train alone.
      if size is not None and size > 1:
        raise UserError(
          f'this is one of {size} processes, but JAX does not know how to meet '
          'the others: set JAX_COORDINATOR_ADDRESS=<host of process 0>:<port>'
        ) from error
  if _others():
    threading.Thread(target=_watch, daemon=True).start()


def _first_of(names: tuple[str, ...]) -> int | None:
  for name in names:
    if text := os.environ.get(name):
      if not text.isdecimal():
        raise UserError(f'{name} = {text!r} in the environment is no number')
      return int(text)
  return None


@contextlib.contextmanager
def signals_noted(
  pass_on: Callable[[int], None] | None = None,
) -> Iterator[None]:
  """SIGTERM, or Ctrl-C once, is told by `should_stop` and ends nothing else.

  A second Ctrl-C ends this process at once. `pass_on` is called with SIGTERM
  where either comes, for a child.
  """
  _noted.clear()
  several = jax.process_count() > 1

  def note(number: int, _) -> None:
    if not _noted:  # what runs now may take minutes: a program is compiled
      os.write(2, b'\nstopping when this step is done; the state is saved\n')
    if number == signal.SIGINT:
      if number in _noted:
        _end(INTERRUPTED)
      _noted.add(number)
      if several:  # JAX knows of SIGTERM, and tells the other processes
        signal.raise_signal(signal.SIGTERM)
        return
    _noted.add(signal.SIGTERM)
    if pass_on:
      pass_on(signal.SIGTERM)

  before = {signal.SIGINT: signal.signal(signal.SIGINT, note)}
  if not several:  # else as JAX has it from `join` on
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, note)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def was_stopped() -> bool:
  """Whether a signal has been noted in this process."""
  return signal.SIGTERM in _noted


def should_stop() -> bool:
  """Whether all processes are to save what they have, and stop.

  True soon after any of them got SIGTERM or Ctrl-C, the same on all, and from
  then on. All must ask equally often: before a stage and after each of its
  steps.
  """
  # JAX has them agree on the number that the furthest of them asks for next,
  # and says yes to no other. So numbers must follow one another without a gap,
  # also across stages and in a resumed run: steps would not do.
  if multihost_utils.reached_preemption_sync_point(next(_asked)):
    _noted.add(signal.SIGTERM)
  return was_stopped()


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
  """Of several processes, one that fails takes the others with it.

  Within seconds, and with its own status if that is 2: what a person must mend
  is not to be started again because the others have lost a peer. To be entered
  before `join`, around what ends in an exit status.
  """
  try:
    yield
  except SystemExit as stop:
    if stop.code not in (None, 0, PREEMPTED, INTERRUPTED):
      _fail(stop.code, stop.__context__)
    raise
  except Exception as error:
    if _others():
      traceback.print_exc()
      _fail(1, error)
    raise
  finally:
    _done.set()


def exit_if_peer_was_lost(error: BaseException | None) -> None:
  """Ends this process if an error, or one behind it, says another is gone.

  At once, not through Python's exit: that would wait for the other.
  """
  while _others() and error is not None:
    # A mistake of the user's may hold any word; files have connections, too.
    of_runtime = not isinstance(error, UserError | OSError)
    if of_runtime and _SIGNS_OF_LOSS.search(str(error)):
      _last_words(
        f'process {jax.process_index()} has lost another one, whose output '
        f'tells more ({str(error).splitlines()[0]}). Run the same command '
        'again on all: it resumes from the latest checkpoint.'
      )
      _end(LOST_PEER)
    error = error.__cause__ or error.__context__


def _others() -> bool:
  """Whether this process has joined others."""
  return (distributed.global_state.num_processes or 1) > 1


def _fail(status: int, error: BaseException | None) -> None:
  """Tells the others, if there are any, and ends this process with them."""
  if not _others():
    return
  _leaving.acquire()
  told = [status, distributed.global_state.process_id, str(error)]
  # Refused if another was first; if the service is gone, so are the others.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    distributed.global_state.client.key_value_set(_FAILED, json.dumps(told))
  _leave(status)


def _watch() -> None:
  """Ends this process when another one has told that it failed."""
  client = distributed.global_state.client
  while not _done.wait(_POLL_S):
    try:
      status, process, message = json.loads(client.key_value_try_get(_FAILED))
    except jax.errors.JaxRuntimeError:  # nothing there
      continue
    _last_words(f'process {process} has failed: {message}')
    _leave(status if status == 2 else LOST_PEER)


def _last_words(what: str) -> None:
  _leaving.acquire()
  print(f'error: {what}', file=sys.stderr, flush=True)


def _leave(status: int) -> None:
  """Ends this process once all know that it ends.

  Not before: those that find a peer or the coordinator gone end in ways of
  their own, some of them in C++.
  """
  run = distributed.global_state
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    run.client.wait_at_barrier(f'{_FAILED}/all', _LONGEST_GOODBYE_S * 1000)
  if run.process_id == 0:
    time.sleep(_POLL_S)  # the service ends with this process: it is the last
  _end(status)


def _end(status: int) -> None:
  """Ends this process without waiting for others, as Python's exit would."""
  for worker in multiprocessing.active_children():
    worker.kill()  # they leave other signals to this process
  sys.stdout.flush()
  os._exit(status)


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
