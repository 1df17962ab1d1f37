# SPDX-License-Identifier: Apache-2.0
"""Runs on several processes and devices: one curve, whatever happens."""

import itertools
import os
import pathlib
import signal
import time

import numpy as np
import pytest
from conftest import rows_of
from PIL import Image
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
  return {
    (int(row['step']), row['metric']): float(row['value'])
    for row in rows_of(path, 'metrics.csv')
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
  [(1, 8), (2, 2), (2, 4), (4, 2)],
)
@SOAK
def test_one_curve(root, data_dir, unbroken, num_processes, devices):
  path = os.path.join(root, f'{num_processes}x{devices}')
  config = tiny_config(data_dir)
  # One copy of the parameters on two devices of two processes.
  config.parameter_shards = 2 if num_processes == 2 else 1
  run(path, config, num_processes=num_processes, devices=devices)
  assert_same_curve(read(path), unbroken)


@pytest.mark.timeout(600)
def test_goes_on_with_another_number_of_processes(root, data_dir, unbroken):
  """Two of two devices with the parameters in shards; then one of eight."""
  path = os.path.join(root, 'changing')
  config = tiny_config(data_dir, parameter_shards=2)

  def wait_for_twelve(path, children):
    return wait_for(lambda: last_checkpoint(path) >= 12, children)

  # The second time before the first step: steps asked for before are none of
  # these processes, and still it counts.
  for wait in (wait_for_twelve, wait_for_session):
    children = start(path, config, num_processes=2, devices=2)
    assert wait(path, children)
    os.kill(children[1].pid, signal.SIGTERM)
    assert join(children) == [processes.PREEMPTED] * 2
    assert 0 < len(read(path)) < len(unbroken)
  config.parameter_shards = 1
  run(path, config, devices=8)
  assert_same_curve(read(path), unbroken)


def test_a_mistake_that_one_process_meets_ends_all(root):
  """With 2, and not after a time-out with what JAX has for a lost peer."""
  rng, folder = np.random.default_rng(0), pathlib.Path(root, 'images')
  for name in ('cat', 'dog'):
    for split, count in (('train', 32), ('val', 32)):
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / split / name / f'{i}.png')
  (folder / 'train/dog/bad.png').write_text('no image')
  config = tiny_config(str(folder))
  config.stages = ('pretrain',)  # which compiles sooner
  config.pretrain.batch_size = 16
  config.seed = 1  # the bad image is not of the first batch
  config.data.update(
    name='folder',
    train_split='train',
    validation_split='val',
    test_split='val',
    augmentation='random_resized_crop',
    least_crop=0.08,
    epoch_images=0,
    least_epoch_images=0,
    max_bad_images=0,
  )
  path = os.path.join(root, 'mistaken')
  assert join(start(path, config, num_processes=2)) == [2, 2]
  assert os.path.exists(os.path.join(path, 'sessions.jsonl')), 'it began'


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
      fault = [signal.SIGTERM, signal.SIGKILL][faults % 2]
      wait = wait_for_checkpoint if rng.random() < 0.8 else wait_for_session
      children = start(path, config, num_processes=2)
      hit = faults < FAULTS and wait(path, children)
      if hit:
        time.sleep(rng.uniform(0.0, 0.5))
        late = last_checkpoint(path) > 110
        victim = children[rng.integers(2)]
        hit = victim.is_alive()
        faults += hit
        os.kill(victim.pid, fault)
      codes = join(children)
      statuses.update(codes)
      if hit and fault == signal.SIGTERM and not late:
        assert codes == [processes.PREEMPTED] * 2
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
  before = last_checkpoint(path)
  return wait_for(lambda: last_checkpoint(path) > before, children)


def last_checkpoint(path) -> int:
  """Step of the latest that was begun; -1 if there is none."""
  try:
    names = os.listdir(os.path.join(path, 'checkpoints/finetune'))
  except FileNotFoundError:
    return -1
  steps = [int(name.partition('.')[0]) for name in names if name[0].isdigit()]
  return max(steps, default=-1)


def wait_for_session(path, children) -> bool:
  """Waits until training begins, with compiling; False if it does not."""

  def lines():
    file = pathlib.Path(path, 'sessions.jsonl')
    return file.read_text().count('\n') if file.exists() else 0

  before = lines()
  return wait_for(lambda: lines() > before, children)


def wait_for(condition, children) -> bool:
  """Waits until it holds; False if the run ends before."""
  while all(child.is_alive() for child in children):
    if condition():
      return True
    time.sleep(0.02)
  return False
