# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: every image once, at every size, and what was chosen."""

import csv
import functools
import itertools
import os
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.sharding import Mesh
from PIL import Image

from drnet_jax import log, processes, settings, workdir
from drnet_jax import mesh as mesh_lib
from drnet_jax.data.pipeline import Data
from drnet_jax.data.sources import Source
from drnet_jax.errors import UserError
from drnet_jax.models import Model
from drnet_jax.report import figures, policies
from drnet_jax.report.policies import Record

_EXAMPLES = 8  # images to try `predict` on
_ON_DEVICE = ('image', 'label', 'valid')  # all else of a batch is extra


class Evaluator:
  """Records what a model says of a split; compiled once for all its calls.

  Args:
    model: to evaluate.
    mesh: devices to run on.
  """

  def __init__(self, model: Model, mesh: Mesh):
    self._model = model
    self._mesh = mesh
    # Every process gets the answers to all images: a few numbers each.
    self._judge = jax.jit(
      functools.partial(_judge, model, mesh),
      static_argnums=0,
      out_shardings=mesh_lib.replicated(mesh),
    )
    macs = model.macs()
    self._costs = {
      'options': np.asarray(model.options),
      'gmacs': np.asarray(macs.gmacs),
      'predictor_gmacs': macs.predictor / 1e9,
    }

  def split(
    self,
    data: Data,
    source: Source,
    description: str,
    params,
    batch_stats,
    *,
    batch_size: int,
    has_router: bool,
  ) -> Record:
    """Runs the model over a split, each process over its part of it.

    Args:
      data: how images become batches.
      source: the split.
      description: for the progress bar.
      params: of the model.
      batch_stats: of the model.
      batch_size: images at a time, over all devices.
      has_router: whether the predictor has been trained.

    Raises:
      UserError: the network returns NaN.
    """
    batches = data.eval_batches(
      source,
      size_px=self._model.image_px,
      batch_size=batch_size,
      process=jax.process_index(),
      num_processes=jax.process_count(),
    )
    return self(
      params,
      batch_stats,
      batches,
      len(source.examples),
      description,
      has_router=has_router,
    )

  def __call__(
    self,
    params,
    batch_stats,
    batches: Iterable[Mapping[str, np.ndarray]],
    num_examples: int,
    description: str,
    *,
    has_router: bool,
  ) -> Record:
    """Runs the model over a split.

    Args:
      params: of the model.
      batch_stats: of the model.
      batches: from `pipeline.eval_batches`, this process's part.
      num_examples: in the split.
      description: for the progress bar.
      has_router: whether the predictor has been trained.

    Raises:
      RuntimeError: the batches did not hold each image once.
      UserError: the network returns NaN.
    """
    parts, extras, indices = [], [], []
    with log.progress(
      total=num_examples, desc=description, unit='img', leave=False
    ) as bar:
      for batch in batches:
        indices.append(batch['index'])
        extras.append(
          {
            k: v[batch['valid']]
            for k, v in batch.items()
            if k not in _ON_DEVICE
          }
        )
        on_device = mesh_lib.shard_batch(
          {k: batch[k] for k in _ON_DEVICE}, self._mesh
        )
        # Fetched a batch later, so that the device always has work queued.
        parts.append(self._judge(has_router, params, batch_stats, on_device))
        if len(parts) > 1:
          parts[-2] = _fetch(parts[-2])
        bar.update(len(batch['valid']) * jax.process_count())
    parts[-1] = _fetch(parts[-1])
    fields = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    seen = np.sort(np.concatenate(sum(processes.gather(indices), [])))
    if not np.array_equal(seen[seen >= 0], np.arange(num_examples)):
      raise RuntimeError(
        f'{description}: not each of {num_examples} images was shown once'
      )
    if not np.isfinite(fields['confidence']).all():
      raise UserError(
        f'{description}: the network returns NaN or infinity; its weights or '
        'statistics are broken'
      )
    # Batch by batch, and within a batch process by process: in order.
    extras = list(itertools.chain(*zip(*processes.gather(extras), strict=True)))
    extra = {k: np.concatenate([e[k] for e in extras]) for k in extras[0]}
    return Record(**{'log_p': None} | self._costs | fields, extra=extra)


def record_split(
  trained: workdir.Trained,
  mesh: Mesh,
  data: Data,
  source: Source,
  description: str,
) -> Record:
  """Runs a trained model once over a split; see `Evaluator`."""
  return Evaluator(trained.model, mesh).split(
    data,
    source,
    description,
    trained.params,
    trained.batch_stats,
    batch_size=trained.config.eval_batch_size,
    has_router=trained.has_router,
  )


def test_record(path: str) -> Record:
  """What `evaluate` recorded of the test split, or the same made now."""
  kept = os.path.join(path, 'report', 'record.npz')
  if os.path.exists(kept):
    return policies.load(kept)
  mesh = mesh_lib.create()
  trained = workdir.load(path, mesh)
  data = settings.call(Data, trained.config.data, 'config.data')
  return record_split(trained, mesh, data, data.open(data.test_split), 'test')


def evaluate(path: str) -> Record:
  """Evaluates the latest weights of a workdir on its test split.

  Prints a table, and leaves in `<workdir>/report/`: `evaluation.csv` (the
  table), `record.npz` (what every image got at every size), the figures
  `accuracy_cost`, `smallest_sufficient` (Figure 1 of the paper) and `by_size`
  (its Figure 4), and a few images as `examples/*.png`.

  Raises:
    UserError: the workdir holds no trained model.
  """
  mesh = mesh_lib.create()
  trained = workdir.load(path, mesh)
  data = settings.call(Data, trained.config.data, 'config.data')
  with processes.main_first('test split'):
    source = data.open(data.test_split)
  record = record_split(trained, mesh, data, source, 'evaluate')
  if processes.is_main():
    _write_report(path, trained, data, source, record)
  processes.wait_for_all('report')
  return record


def _write_report(
  path: str,
  trained: workdir.Trained,
  data: Data,
  source: Source,
  record: Record,
) -> None:
  """Leaves what `evaluate` promises, and prints the table."""
  directory = os.path.join(path, 'report')
  os.makedirs(directory, exist_ok=True)
  policies.save(record, os.path.join(directory, 'record.npz'))
  _write_csv(record, os.path.join(directory, 'evaluation.csv'))
  figures.accuracy_cost(record, os.path.join(directory, 'accuracy_cost'))

  def read_image(i: int) -> np.ndarray:
    # Images that cannot be read are in the split and not in the record.
    encoded = source.examples[record.extra['index'][i]]['image']
    return data.eval_image(encoded, trained.model.image_px)

  grids = {'smallest_sufficient': figures.by_smallest_sufficient}
  if trained.has_router:
    grids['by_size'] = figures.by_size
  for name, draw in grids.items():
    file = os.path.join(directory, name)
    draw(record, read_image, trained.class_names, file)
  examples = os.path.join(directory, 'examples')
  os.makedirs(examples, exist_ok=True)
  for i in range(min(_EXAMPLES, len(record.label))):
    name = f'{i}_{trained.class_names[record.label[i]]}.png'.replace('/', '_')
    Image.fromarray(read_image(i)).save(os.path.join(examples, name))
  bad = len(source.examples) - len(record.label)
  log.say(
    f'\n{data.name}/{data.test_split}, {len(record.label)} images'
    + (f'; {bad} more cannot be read and are left out' if bad else '')
  )
  log.say(summary(record))
  log.say(f'Report: {directory}')


def summary(record: Record) -> str:
  """The table of an evaluation and its bottom line, as text."""
  rows = []
  for policy in policies.all_policies(record):
    row = {
      'policy': policy.name,
      'top-1 %': f'{100 * policy.top1:.2f}',
      'top-5 %': '' if policy.top5 is None else f'{100 * policy.top5:.2f}',
      'GMACs': f'{policy.gmacs:.4g}',
      'cost %': f'{100 * policy.gmacs / record.gmacs.max():.1f}',
    }
    for option, share in zip(record.options, policy.shares, strict=True):
      row[option] = '' if np.isnan(share) else f'{100 * share:.1f} %'
    rows.append(row)
  needed = policies.smallest_sufficient(record)
  shares = np.bincount(needed, minlength=len(record.options) + 1)
  options = [*record.options, 'none']
  lines = [
    log.table(rows),
    'Cheapest that is right: '
    + ', '.join(
      f'{100 * count / len(needed):.1f} % {option}'
      for option, count in zip(options, shares, strict=True)
    )
    + '.',
  ]
  if record.log_p is None:
    return '\n'.join(lines)
  router = policies.routed(record)
  for rival in (
    policies.best_fixed(record, router.gmacs),
    policies.random_choice(record, router.gmacs),
  ):
    gain = 100 * (router.top1 - rival.top1)
    lines.append(
      f'Routing gains {gain:+.2f} points over {rival.name} at the same cost.'
    )
  for name, rho in rank_correlations(record).items():
    lines.append(f'Rank correlation of chosen size and {name}: {rho:+.2f}.')
  lines.append(
    f'The predictor ({record.predictor_gmacs:.4g} GMACs an image) is counted.'
  )
  return '\n'.join(lines)


def rank_correlations(record: Record) -> dict[str, float]:
  """Spearman's rho between the chosen size and each numeric extra field."""
  return {
    name: float(scipy.stats.spearmanr(values, record.choice).statistic)
    for name, values in record.extra.items()
    if name != 'index'
    and np.issubdtype(values.dtype, np.number)
    and np.ptp(record.choice)
  }


def _write_csv(record: Record, path: str) -> None:
  with open(path, 'w', newline='') as file:
    writer = csv.writer(file)
    shares = [f'share of {option}' for option in record.options]
    writer.writerow(['policy', 'gmacs', 'top1', 'top5', *shares])
    for policy in policies.all_policies(record):
      writer.writerow(
        [policy.name, policy.gmacs, policy.top1, policy.top5, *policy.shares]
      )


def _judge(
  model: Model, mesh: Mesh, has_router: bool, params, batch_stats, batch
):
  """What a `Record` holds, for one batch."""
  images, labels = batch['image'], batch['label']
  params = mesh_lib.gathered(params, mesh)
  logits = model.all_logits(params, batch_stats, images)  # [B, R, K]
  of_label = jnp.take_along_axis(logits, labels[:, None, None], -1)
  judged = {
    'valid': batch['valid'],
    'label': labels,
    'predicted': logits.argmax(-1).astype(jnp.int32),
    'confidence': jax.nn.softmax(logits).max(-1),
    'top5': (logits > of_label).sum(-1) < 5,
  }
  if has_router:
    scores, _ = model.predict(
      params['predictor'], batch_stats['predictor'], images, train=False
    )
    judged['log_p'] = jax.nn.log_softmax(scores)
  return judged


def _fetch(judged: dict[str, jax.Array]) -> dict[str, np.ndarray]:
  valid = np.asarray(judged['valid'])
  return {k: np.asarray(v)[valid] for k, v in judged.items() if k != 'valid'}
