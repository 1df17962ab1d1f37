# SPDX-License-Identifier: Apache-2.0
"""What ends a process: SIGTERM, and errors that tell of others."""

import contextlib
import os
import signal
import threading

import pytest
from absl.testing import flagsaver
from jax._src import distributed
from jax.experimental import multihost_utils

from drnet_jax import processes
from drnet_jax.commands import cli
from drnet_jax.errors import UserError


@pytest.mark.parametrize('while_asking', [True, False])
def test_sigterm_counts_whenever_it_comes(monkeypatch, while_asking):
  def reached(number):
    del number
    if while_asking:
      os.kill(os.getpid(), signal.SIGTERM)
    return False

  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', reached)
  with processes.signals_noted():
    if not while_asking:
      assert not processes.should_stop()
      os.kill(os.getpid(), signal.SIGTERM)
    assert processes.should_stop() and processes.should_stop()


GLOO = RuntimeError('Gloo AllReduce failed: Connection closed by peer [::1]:9')


def behind(error, cause):
  error.__cause__ = cause
  return error


@pytest.mark.parametrize(
  'error, is_loss',
  [
    (GLOO, True),
    (RuntimeError('NCCL: remote process exited or there was a network'), True),
    (ValueError('Failed to send RPC to coordination service.'), True),
    (behind(UserError('checkpoint 7 cannot be restored'), GLOO), True),
    (RuntimeError('NCCL operation failed: unhandled cuda error'), False),
    (RuntimeError('Gloo: unable to resolve host name'), False),
    (UserError('heartbeat.jpg cannot be read'), False),
    (ConnectionResetError(104, 'Connection reset by peer'), False),
  ],
)
def test_a_lost_peer_is_told_by_a_connection_that_ended(
  monkeypatch, error, is_loss
):
  left = []

  def leave(status):
    left.append(status)
    raise SystemExit(status)

  monkeypatch.setattr(distributed.global_state, 'num_processes', 2)
  monkeypatch.setattr(processes, '_leaving', threading.Lock())
  monkeypatch.setattr(os, '_exit', leave)
  with contextlib.suppress(SystemExit):
    processes.exit_if_peer_was_lost(error)
  assert left == [processes.LOST_PEER] * is_loss


def test_ctrl_c_saves_and_a_second_one_ends_at_once(monkeypatch):
  ended, passed_on = [], []
  monkeypatch.setattr(processes, '_end', ended.append)
  before = signal.getsignal(signal.SIGINT)
  with processes.signals_noted(passed_on.append):
    assert not processes.was_stopped()
    os.kill(os.getpid(), signal.SIGINT)
    assert processes.was_stopped() and processes.should_stop() and not ended
    assert passed_on == [signal.SIGTERM]
    stop = processes.Stopped('at step 3')
    assert (str(stop), stop.status) == ('stopped by Ctrl-C at step 3', 130)
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [130]
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
  'size, rank, message',
  [
    ('2', '2', 'process 2 of 2 by the environment: they are numbered from 0'),
    ('two', '0', "JAX_NUM_PROCESSES = 'two' in the environment is no number"),
    ('', '0', 'not JAX_NUM_PROCESSES and JAX_PROCESS_ID'),
  ],
)
def test_an_environment_that_does_not_count_up(
  monkeypatch, size, rank, message
):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', '127.0.0.1:1')
  monkeypatch.setenv('JAX_NUM_PROCESSES', size)
  monkeypatch.setenv('JAX_PROCESS_ID', rank)
  with pytest.raises(UserError, match=message):
    processes.join(peer_timeout_s=1)


def test_home_is_known_in_every_argument(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  given = '--workdir=~/a,~/b,c~d --to=~ ~/x~/y a=~no_such_user/b'.split()
  wanted = '--workdir=/home/me/a,/home/me/b,c~d --to=/home/me /home/me/x~/y '
  assert cli.with_home(given) == [*wanted.split(), given[-1]]
  with flagsaver.flagsaver(workdir=None):
    left = cli.keep_overrides(['main', '--workdir=~/a', '--config.x=~/b'])
    assert left == ['main', '--config.x=/home/me/b']
    assert cli.workdir() == '/home/me/a'


def test_a_workdir_is_a_folder():
  with flagsaver.flagsaver(workdir='gs://bucket/a'):
    with pytest.raises(UserError, match='gs://bucket/a: runs live in folders'):
      cli.workdir()


def test_overrides_are_left_over_for_the_command():
  given = ['main', '--config.data.data_dir=/new', '--workdir=x']
  with flagsaver.flagsaver(workdir=None):
    assert cli.keep_overrides(given) == ['main', '--config.data.data_dir=/new']
