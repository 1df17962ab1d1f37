# SPDX-License-Identifier: Apache-2.0
"""Estimates what training takes; the command `cost` tells how."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from drnet_jax import models, routing, terminal
from drnet_jax.errors import UserError
from drnet_jax.flops import Macs
from drnet_jax.models.drnet import DRNet
from drnet_jax.run import train
from drnet_jax.run.stage import Stage
from drnet_jax.steps.routed_objective import RoutedObjective


class Machine(NamedTuple):
  """Devices, from the vendor's data sheets."""

  name: str
  devices: int  # chips or GPUs
  devices_per_host: int
  peak_flops: float  # of a device: bfloat16, dense, per second
  memory_gb: float  # of a device


MACHINES = (
  Machine('v5e-8', 8, 8, 197e12, 16),
  Machine('v5p-32', 16, 4, 459e12, 95),  # 32 counts cores, two to a chip
  Machine('8 x H100', 8, 8, 989e12, 80),
)

_FLOPS_PER_MAC = 2
_PASSES = 3  # forward; backward for the input's and for the kernel's gradient
# XLA's programs for CPUs take 1.85 (the quick start's network) and 1.98 times
# (ResNet-18) the inputs and outputs of the convolutions, see tests.
_ACTIVATION_FACTOR = 2


def macs_per_image(stage: Stage, macs: Macs) -> float:
  """Multiply-adds of one image in one step, forward and backward.

  Of a routed stage, at the average cost it aims for.
  """
  every_size = sum(macs.sizes)
  if stage.step == 'pretrain':
    return _PASSES * every_size
  objective = stage.objective
  chosen = macs.sizes[-1]
  if objective['eta'] and not objective['costs']:
    chosen = min(1e9 * objective['target_gmacs'], chosen)
  explored = objective['explore'] if objective['gradient'] == 'all' else 0.0
  return _PASSES * (chosen + macs.predictor) + explored * every_size


def training_hours(
  stage: Stage, macs: Macs, machine: Machine, *, images: int, mfu: float
) -> float:
  """Hours of all epochs of a stage; validation is not counted."""
  flops = _FLOPS_PER_MAC * macs_per_image(stage, macs) * images * stage.epochs
  return flops / (machine.devices * machine.peak_flops * mfu) / 3600


def weight_bytes(stage: Stage, model: DRNet, *, shards: int) -> float:
  """Memory of one device for what does not depend on the batch.

  `shards` devices share one copy of the parameters.
  """
  params, stats = model.shapes
  # The parameters and their gradient, and what the optimiser keeps.
  copies = 2 + (2 if stage.optimizer['name'] == 'adamw' else 1)
  copies += (stage.accumulate > 1) + (stage.ema_decay > 0)
  total = _bytes(params) * copies / shards
  total += _bytes(stats) * (1 + (stage.ema_decay > 0))
  if shards > 1:
    total += _bytes(params)  # gathered for the time of a step
  return total


def activation_bytes(model: DRNet, size_px: int) -> int:
  """What one image takes at one size while it is trained on.

  The backward pass needs each convolution's input and its output (for the norm
  after it); gradients and what XLA keeps besides are as much again.
  """
  params, stats = model.shapes
  name = model.norm_set(size_px)
  classify = functools.partial(model.classify, size_px=size_px)
  norms = params['norm'][name], stats['norm'][name]
  return _held_bytes(classify, model, params['base'], *norms)


def predictor_bytes(model: DRNet) -> int:
  """The same, of the predictor."""
  params, stats = model.shapes
  return _held_bytes(
    model.predict, model, params['predictor'], stats['predictor']
  )


def _held_bytes(function, model: DRNet, *arguments) -> int:
  image = jax.ShapeDtypeStruct((1, model.image_px, model.image_px, 3), np.uint8)
  key = jax.random.key(0)  # of a dropout
  traced = jax.make_jaxpr(functools.partial(function, train=True, key=key))(
    *arguments, image
  )
  return _ACTIVATION_FACTOR * _convolved_bytes(traced.jaxpr)


def _convolved_bytes(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'conv_general_dilated':
      ends = (equation.invars[0], equation.outvars[0])
      total += sum(v.aval.size * v.aval.dtype.itemsize for v in ends)
    inner = [*equation.params.values()]
    if platforms := equation.params.get('branches_platforms'):
      # Written for several platforms: the one that is for all of them.
      inner = [equation.params['branches'][platforms.index(None)]]
    total += sum(
      _convolved_bytes(x.jaxpr) for x in inner if hasattr(x, 'jaxpr')
    )
  return total


def _bytes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Balance(NamedTuple):
  """How full the slots of a routed step are."""

  # Work of the fullest device at each size over the mean device's.
  imbalance: float
  # Work with slots rounded up to buckets over that of the fullest.
  padding: float

  @property
  def useful(self) -> float:
    """Share of the computed slots' work that is an image's."""
    return 1 / (self.imbalance * self.padding)


def simulate_balance(
  shares: Sequence[float],
  gmacs: Sequence[float],
  *,
  devices: int,
  local_batch: int,
  growth: float,
) -> Balance:
  """Draws sizes for every image and fills the buckets as `steps.routed` does.

  Each of the devices, of `local_batch` images, runs the slots that the fullest
  one needs. `growth` is that of `routing.bucket_ladder`.
  """
  rng = np.random.default_rng(0)
  ladder = routing.bucket_ladder(local_batch, growth=growth, platform='tpu')
  mean = fullest = padded = 0.0
  for _ in range(20):  # steps to average over
    counts = rng.multinomial(local_batch, shares, size=devices)
    most = counts.max(0)
    rungs = [routing.bucket(int(n), ladder) if n else 0 for n in most]
    mean += counts.mean(0) @ np.asarray(gmacs)
    fullest += most @ np.asarray(gmacs)
    padded += np.dot(rungs, gmacs)
  return Balance(imbalance=fullest / mean, padding=padded / fullest)


def _images_per_device(stage: Stage, machine: Machine) -> int:
  return math.ceil(stage.batch_size / stage.accumulate / machine.devices)


def _held(stage: Stage, of_size: Mapping[int, int]) -> int:
  """Bytes of an image, of all sizes that wait for the backward pass."""
  told = stage.objective if stage.step == 'pretrain' else {}
  all_wait = told.get('distill') and told.get('teacher') != 'largest'
  return (sum if all_wait else max)(of_size.values())


def _estimate_table(
  run: train.Run, model: DRNet, images: int, mfu: float, per_core: float
) -> list[dict[str, str]]:
  """Rows: what each stage takes on each machine; see `report`."""
  macs, rows = model.macs(), []
  of_size = {r: activation_bytes(model, r) for r in model.resolutions}
  for machine in MACHINES:
    shards = run.parameter_shards or machine.devices
    hosts = machine.devices // machine.devices_per_host
    for name, stage in run.stages.items():
      local = _images_per_device(stage, machine)
      memory = local * _held(stage, of_size)
      memory += weight_bytes(stage, model, shards=shards)
      hours = training_hours(stage, macs, machine, images=images, mfu=mfu)
      of_host = images * stage.epochs / hours / 3600 / hosts
      rows.append(
        {
          'machine': machine.name,
          'stage': name,
          'images/device': str(local),
          'GB/device': f'{memory / 1e9:.1f} of {machine.memory_gb:g}',
          'hours': f'{hours:.1f}',
          'images/s a host': f'{of_host:,.0f}',
          'cores a host': f'{of_host / per_core:.0f}',
        }
      )
  return rows


def program_table(
  stages: Mapping[str, Stage], model: DRNet, machine: Machine, *, shards: int
) -> list[dict[str, str]]:
  """Rows: the programs of each stage, and what a device holds while they run.

  `shards` devices share one copy of the parameters.
  """
  rows = []
  of_size = {r: activation_bytes(model, r) for r in model.resolutions}
  image_bytes = 3 * model.image_px**2
  for name, stage in stages.items():
    local = _images_per_device(stage, machine)
    resident = local * image_bytes + weight_bytes(stage, model, shards=shards)
    programs = {'step': (1, local * _held(stage, of_size))}
    if stage.step == 'routed':
      objective = stage.objective
      rungs = routing.bucket_ladder(
        local, growth=objective['bucket_growth'], platform='tpu'
      )
      programs = {'route': (1, local * predictor_bytes(model))}
      for r, held in of_size.items():
        programs[f'learn, {r} px'] = (len(rungs), local * held)
      # Forward only: the widest layer is far less than all of them.
      once = len(of_size) * (
        (objective['gradient'] == 'all') + (objective['statistics'] == 'fresh')
      )
      programs |= {'explore, refresh': (once, 0)} if once else {}
      programs['update'] = (1, 0)
    for program, (count, held) in programs.items():
      gb = (resident + held) / 1e9
      rows.append(
        {
          'stage': name,
          'program': program,
          'number': str(count),
          'GB at most': f'{gb:.1f}',
          f'of {machine.name}': f'{gb / machine.memory_gb:.0%}',
        }
      )
  return rows


def _balance_table(
  shares: Sequence[float], gmacs: Sequence[float], growth: float
) -> list[dict[str, str]]:
  """Rows: the balance at numbers of hosts (of four devices) and batches."""
  rows = []
  for hosts, batch in itertools.product((1, 64, 1024), (32, 64, 128, 256)):
    balance = simulate_balance(
      shares, gmacs, devices=4 * hosts, local_batch=batch, growth=growth
    )
    rows.append(
      {
        'hosts': str(hosts),
        'images/device': str(batch),
        'imbalance': f'{balance.imbalance:.2f}',
        'padding': f'{balance.padding:.2f}',
        'useful': f'{balance.useful:.0%}',
      }
    )
  return rows


def shares_of_cost(costs: Sequence[float], target: float) -> np.ndarray:
  """Shares of the sizes with a given mean cost, otherwise as even as can be."""
  costs = np.asarray(costs)
  slopes = np.linspace(-50, 50, 2001)[:, None]
  weights = np.exp(slopes * (costs - costs.mean()) / np.ptp(costs))
  shares = weights / weights.sum(1, keepdims=True)
  return shares[np.abs(shares @ costs - target).argmin()]


def report(
  config: ml_collections.ConfigDict,
  *,
  mfu: float,
  images_per_core: float,
  train_images: int,
) -> str:
  """The tables of a config, as text; for the arguments see the command's flags.

  Raises:
    UserError: a mistake in the config, or a RANet.
  """
  run = train.read(config)
  model = models.create(run.model, num_classes=len(run.data.class_names()))
  if not isinstance(model, DRNet):
    raise UserError('the estimate is for DRNets; config.model makes a RANet')
  routed = [s.objective for s in run.stages.values() if s.step == 'routed']
  for objective in routed:
    RoutedObjective(**objective).check_model(model)
  images = run.data.epoch_images or train_images
  rows = _estimate_table(run, model, images, mfu, images_per_core)
  tables = [(f'Estimated, at {mfu:.0%} of the peak', rows)]
  for machine in MACHINES[:2]:
    shards = run.parameter_shards or machine.devices
    rows = program_table(run.stages, model, machine, shards=shards)
    tables.append((f'Programs of {machine.name}', rows))
  gmacs = model.macs().gmacs
  for objective in routed:
    costs = objective['costs'] or gmacs
    target = min(objective['target_gmacs'], max(costs))
    shares = shares_of_cost(costs, target)
    parts = ', '.join(
      f'{r} px {share:.0%}'
      for r, share in zip(model.resolutions, shares, strict=True)
    )
    rows = _balance_table(shares, gmacs, objective['bucket_growth'])
    tables.append((f'Simulated, sizes drawn as {parts}', rows))
  return '\n\n'.join(
    f'{title}:\n\n{terminal.table(rows)}' for title, rows in tables
  )
