# SPDX-License-Identifier: Apache-2.0
"""Runs on several processes and devices: one curve, whatever happens."""

import csv
import os

import numpy as np
import pytest
from run_processes import run, tiny_config

ONE = (1, 1)


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
    pytest.param(2, 4, marks=pytest.mark.slow),
    pytest.param(4, 2, marks=pytest.mark.slow),
  ],
)
def test_one_curve(root, data_dir, unbroken, num_processes, devices):
  path = os.path.join(root, f'{num_processes}x{devices}')
  config = tiny_config(data_dir)
  run(path, config, num_processes=num_processes, devices=devices)
  assert_same_curve(read(path), unbroken)
