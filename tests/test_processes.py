# SPDX-License-Identifier: Apache-2.0
"""Runs on several processes and devices: one curve, whatever happens."""

import csv
import itertools
import os
import signal
import time

import numpy as np
import pytest
from run_processes import run, start, tiny_config

from drnet_jax import processes

pytestmark = pytest.mark.slow

SOAK = pytest.mark.soak
# Each takes a start of two processes, half a minute.
FAULTS = int(os.environ.get('DRNET_JAX_FAULTS', 20))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return str(tmp_path_factory.mktemp('processes'))


@pytest.fixture(scope='module')
def unbroken(root, data_dir):
  """Rows of metrics of a run on one process and one device."""
  path = os.path.join(root, 'unbroken')
  run(path, tiny_config(data_dir))
  return read(path)


def read(path):
  """{(step, metric): value}."""
  with open(os.path.join(path, 'metrics.csv'), newline='') as file:
    return {
      (int(row['step']), row['metric']): float(row['value'])
      for row in csv.DictReader(file)
    }


def assert_same_curve(ours, theirs, tolerance=1e-4):
  assert ours.keys() == theirs.keys()
  assert sum(metric == 'train/loss' for _, metric in ours) == 30
  for (step, metric), value in theirs.items():
    np.testing.assert_allclose(
      ours[step, metric],
      value,
      rtol=tolerance,
      atol=tolerance,
      err_msg=f'{metric}, step {step}',
    )


@pytest.mark.parametrize(
  'num_processes, devices',
  [
    (1, 8),
    (2, 2),
    pytest.param(2, 4, marks=SOAK),
    pytest.param(4, 2, marks=SOAK),
  ],
)
def test_one_curve(root, data_dir, unbroken, num_processes, devices):
  path = os.path.join(root, f'{num_processes}x{devices}')
  config = tiny_config(data_dir)
  # One copy of the parameters on two devices of two processes.
  config.parameter_shards = 2 if num_processes == 2 else 1
  run(path, config, num_processes=num_processes, devices=devices)
  assert_same_curve(read(path), unbroken)


@pytest.mark.timeout(600)
def test_goes_on_with_another_number_of_processes(root, data_dir, unbroken):
  path = os.path.join(root, 'changing')
  config = tiny_config(data_dir)
  children = start(path, config, num_processes=2, devices=2)
  wait_for_checkpoint(path, children)
  os.kill(children[1].pid, signal.SIGTERM)
  assert join(children) == [processes.PREEMPTED] * 2
  assert 0 < len(read(path)) < len(unbroken)
  run(path, config, devices=8)
  assert_same_curve(read(path), unbroken)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_survives_faults(root, data_dir):
  """kill -9 or SIGTERM of one of two: the numbers of the run left alone."""
  config = tiny_config(data_dir, **{'finetune.epochs': 4.0})
  calm = os.path.join(root, 'calm')
  run(calm, config, num_processes=2)
  rng, faults, statuses = np.random.default_rng(0), 0, set()
  for i in itertools.count():
    # As many runs as it takes: some come to their end before they are hit.
    path, codes = os.path.join(root, f'faults{i}'), None
    while codes != [0, 0]:
      children = start(path, config, num_processes=2)
      if faults < FAULTS and wait_for_checkpoint(path, children):
        time.sleep(rng.uniform(0.0, 0.5))
        victim = children[rng.integers(2)]
        faults += victim.is_alive()
        os.kill(victim.pid, [signal.SIGTERM, signal.SIGKILL][faults % 2])
      codes = join(children)
      statuses.update(codes)
    assert read(path) == read(calm)
    if faults == FAULTS:
      break
  # Saved and stopped; killed; lost the other, found by Gloo or by JAX.
  assert {processes.PREEMPTED, -signal.SIGKILL} <= statuses
  assert statuses <= {
    0,
    processes.PREEMPTED,
    processes.LOST_PEER,
    -signal.SIGKILL,
    -signal.SIGABRT,
    -signal.SIGTERM,
  }


def join(children):
  for child in children:
    child.join()
  return [child.exitcode for child in children]


def wait_for_checkpoint(path, children) -> bool:
  """Waits for a new one (whole or not); False if the run ends before."""
  start_time, folder = time.time(), os.path.join(path, 'checkpoints/finetune')
  while all(child.is_alive() for child in children):
    if os.path.isdir(folder) and os.path.getmtime(folder) > start_time:
      return True
    time.sleep(0.02)
  return False
