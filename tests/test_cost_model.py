# SPDX-License-Identifier: Apache-2.0
"""The cost model against what was measured, and against arithmetic."""

import dataclasses
import pathlib
import types

import jax
import numpy as np
import pytest
from conftest import rows_of, tiny_model

from configs import cifar10_ranet, in1k, quickstart
from drnet_jax import models
from drnet_jax.bench import cost_model
from drnet_jax.errors import UserError
from drnet_jax.flops import Macs
from drnet_jax.run import train

RESULTS = pathlib.Path(__file__).parents[1] / 'results'


def test_macs_of_the_stages():
  run = train.read(quickstart.get_config())
  macs = Macs(sizes=(1_000_000, 4_000_000, 9_000_000), predictor=500_000)
  # forward and backward: 3 x; all sizes in stage 1
  assert cost_model.macs_per_image(run.stages['pretrain'], macs) == 3 * 14e6
  # alpha = .0061 GMACs, and an eighth of the images forward at all sizes
  expected = 3 * (6.1e6 + 5e5) + 0.125 * 14e6
  assert cost_model.macs_per_image(run.stages['finetune'], macs) == expected


def test_one_rate_explains_the_measured_steps():
  """images/s x MACs is the same for all kinds of step, within 10 %."""
  rows = rows_of(RESULTS, 'training_step.csv')
  rates = [
    float(row['images_per_second']) * float(row['mmacs_per_image'])
    for row in rows
  ]
  assert len(rates) == 3
  assert np.ptp(rates) < 0.1 * np.mean(rates)


def test_activations_are_what_xla_allocates():
  config = quickstart.get_config().model.to_dict()
  model = models.create(config, num_classes=10)
  params, stats = model.shapes
  images = jax.ShapeDtypeStruct((64, 64, 64, 3), np.uint8)

  def loss(base, norm, stats, images):
    logits, new = model.classify(base, norm, stats, images, 64, train=True)
    return logits.sum(), new

  compiled = (
    jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    .lower(params['base'], params['norm']['r64'], stats['norm']['r64'], images)
    .compile()
  )
  measured = compiled.memory_analysis().temp_size_in_bytes / 64
  assert cost_model.activation_bytes(model, 64) == pytest.approx(
    measured, rel=0.15
  )


def test_averages_and_gradients_that_are_kept_are_counted():
  model = tiny_model()
  stage = train.read(quickstart.get_config()).stages['pretrain']
  params, stats = (
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    for tree in model.shapes
  )

  def extra(**changes):
    changed = dataclasses.replace(stage, **changes)
    return cost_model.weight_bytes(
      changed, model, shards=1
    ) - cost_model.weight_bytes(stage, model, shards=1)

  assert extra(ema_decay=0.9) == params + stats
  assert extra(accumulate=2) == params


@pytest.mark.usefixtures('shapes_alone')
def test_programs_are_counted_and_fit():
  run = train.read(in1k.get_config())
  model = models.create(run.model, num_classes=1000)
  machine = cost_model.Machine('toy', 1, 1, 1e12, 16)
  rows = cost_model.program_table(run.stages, model, machine, shards=1)
  numbers = {row['program']: int(row['number']) for row in rows}
  # 256 images a device, buckets by eights from 32 on
  assert numbers == {
    'step': 1,
    'route': 1,
    'learn, 112 px': 19,
    'learn, 168 px': 19,
    'learn, 224 px': 19,
    'update': 1,
  }
  held = {row['program']: float(row['GB at most']) for row in rows}
  # activations go with the area, weights stay
  assert 3 < held['learn, 224 px'] / held['learn, 112 px'] < 4
  assert held['learn, 224 px'] == held['step']


@pytest.mark.usefixtures('shapes_alone')
def test_the_report_of_a_config():
  def report(config):
    return cost_model.report(
      config, mfu=0.25, images_per_core=500, train_images=1000
    )

  text = report(quickstart.get_config())
  for part in ('v5e-8', 'Programs of v5p-32', 'learn, 40 px', 'Simulated'):
    assert part in text
  with pytest.raises(UserError, match='makes a RANet'):
    report(cifar10_ranet.get_config())
  config = quickstart.get_config()
  config.model.resolutions = (64,)
  with pytest.raises(UserError, match='at least two sizes'):
    report(config)


def test_hours():
  stage = types.SimpleNamespace(step='pretrain', epochs=10)
  machine = cost_model.Machine('toy', 4, 4, 1e12, 16)
  # 2 x 3 x 1e9 FLOPs x 1e6 images x 10 epochs / (4 x 1e12 x .5) = 30,000 s
  hours = cost_model.training_hours(
    stage, Macs(sizes=(10**9,), predictor=0), machine, images=10**6, mfu=0.5
  )
  assert hours == pytest.approx(30_000 / 3600)


def test_balance():
  def useful(devices, local_batch, shares=(0.3, 0.45, 0.25)):
    return cost_model.simulate_balance(
      shares,
      (1.0, 2.5, 4.0),
      devices=devices,
      local_batch=local_batch,
      growth=1.125,
    )

  # One device has nobody to wait for; one size needs no bucket but the last.
  assert useful(1, 256).imbalance == 1
  assert useful(64, 256, shares=(0, 0, 1)).useful == 1
  # More devices: a fuller fullest one. More images: nearer to the mean.
  assert useful(4, 256).useful > useful(4096, 256).useful
  assert useful(256, 512).useful > useful(256, 64).useful


def test_shares_of_a_cost():
  gmacs = tiny_model().macs().gmacs
  target = 0.3 * gmacs[0] + 0.7 * gmacs[-1]
  shares = cost_model.shares_of_cost(gmacs, target)
  assert shares @ np.asarray(gmacs) == pytest.approx(target, rel=0.02)
  assert shares.sum() == pytest.approx(1)
