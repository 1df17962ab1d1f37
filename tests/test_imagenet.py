# SPDX-License-Identifier: Apache-2.0
"""Real weights on real photographs, through the commands a user would give."""

import os

import forked
import pytest
import torch_golden

from configs import imagenet_sizes
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing import scores
from drnet_jax.run import evaluate, weights

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not torch_golden.DATA.exists(),
    reason='the photographs of DRNET_JAX_DATA are not there',
  ),
]


@pytest.mark.parametrize(
  'size_px, top1, top5',
  [
    (96, 0.400, 0.656),
    pytest.param(112, 0.547, 0.780, marks=pytest.mark.soak),
    pytest.param(168, 0.739, 0.907, marks=pytest.mark.soak),
  ],
)
def test_accuracy_is_what_pytorch_measured(tmp_path, size_px, top1, top5):
  """data/README.md's figures for 1,000 images, resized by Pillow as there."""
  file, name, padding, mean, std = torch_golden.REAL[1]
  config = imagenet_sizes.get_config()
  config.data.data_dir = str(torch_golden.DATA / 'imagenet_val1300_227.npz')
  config.data.resize_px = size_px
  config.data.keep_aspect = False
  config.eval_batch_size = 40
  config.model.update(
    base={'network': name, 'padding': padding},
    image_px=size_px,
    resolutions=(size_px,),
    mean=mean,
    std=std,
  )
  path = str(tmp_path / 'run')
  weights.import_torch(config, str(torch_golden.DATA / f'{file}.npz'), path)
  # Compiled as for users: of so many images it is running that takes the time.
  devices = '--xla_force_host_platform_device_count=8'
  child = forked.start(evaluate.evaluate, path, XLA_FLAGS=devices)
  child.join()
  assert child.exitcode == 0
  record = record_lib.load(os.path.join(path, 'report', 'record.npz'))
  (fixed,) = scores.fixed_scores(record)
  assert len(record.label) == 1000
  assert fixed.top1 == pytest.approx(top1, abs=0.003)
  assert fixed.top5 == pytest.approx(top5, abs=0.003)
