# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, in one process."""

import os
import signal

import pytest
from jax.experimental import multihost_utils

from drnet_jax import processes


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
