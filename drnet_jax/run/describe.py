# SPDX-License-Identifier: Apache-2.0
"""Parameter count and cost of a config's model, without images or weights."""

import jax
import ml_collections

from drnet_jax import models, settings, terminal
from drnet_jax.data.pipeline import Data
from drnet_jax.models.drnet import DRNet
from drnet_jax.models.ranet import RANet


def describe(config: ml_collections.ConfigDict) -> str:
  """Tables of parameters and multiply-adds, as text.

  Of the config, `model` and the class names of `data` are used.

  Raises:
    UserError: a model that cannot be built.
  """
  data = settings.call(Data, settings.field(config, 'data'), 'config.data')
  names = data.class_names()
  section = settings.field(config, 'model')
  model = models.create(section, num_classes=len(names))
  tables = _of_exits(model) if isinstance(model, RANet) else _of_sizes(model)
  return '\n\n'.join([f'{len(names)} classes', *tables])


def _of_sizes(model: DRNet) -> list[str]:
  macs = model.macs()
  full = max(macs.sizes)
  costs = dict(zip(model.options, macs.sizes, strict=True))
  routed = []
  if model.predictor is not None:
    costs[f'predictor ({model.predictor_px} px)'] = macs.predictor
    low = (min(macs.sizes) + macs.predictor) / 1e9
    high = (full + macs.predictor) / 1e9
    routed = [
      f'Routed, predictor counted: {low:.4g} to {high:.4g} GMACs an image.'
    ]
  parameters = [
    {'parameters': name, '': f'{count:,}'}
    for name, count in count_parameters(model).items()
  ]
  rows = [
    {
      'cost of an image': name,
      'MMACs': f'{cost / 1e6:,.1f}',
      '% of the largest': f'{100 * cost / full:.1f}',
    }
    for name, cost in costs.items()
  ]
  return [terminal.table(parameters), terminal.table(rows), *routed]


def _of_exits(model: RANet) -> list[str]:
  costs = model.macs_and_parameters
  full = costs[-1][0]
  rows = [
    {
      'up to': option,
      'parameters': f'{parameters:,}',
      'MMACs': f'{macs / 1e6:,.1f}',
      '% of all': f'{100 * macs / full:.1f}',
    }
    for option, (macs, parameters) in zip(model.options, costs, strict=True)
  ]
  return [terminal.table(rows)]


def count_parameters(model: DRNet) -> dict[str, int]:
  """Parameters by part; a *set* of norms belongs to one size."""
  params, _ = model.shapes

  def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))

  sets = params['norm']
  first = count(next(iter(sets.values())))
  parts = {
    'shared by all sizes': count(params['base']),
    f'norms, {len(sets)} x {first:,}': count(sets),
    'predictor': count(params['predictor']),
  }
  return parts | {
    'in all': sum(parts.values()),
    # What the paper's tables seem to count.
    'with one set of norms': sum(parts.values()) - (len(sets) - 1) * first,
  }
