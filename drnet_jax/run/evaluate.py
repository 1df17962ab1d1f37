# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: every image once, at every size, and what was chosen."""

import functools
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from drnet_jax import mesh as mesh_lib
from drnet_jax import processes, settings, terminal
from drnet_jax.data.pipeline import Data
from drnet_jax.data.sources import Source
from drnet_jax.errors import NotFinite, UserError
from drnet_jax.models import Model
from drnet_jax.report import pictures, policies, run, run_page
from drnet_jax.report.page import FILE
from drnet_jax.report.policies import Record
from drnet_jax.run import workdir

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
      NotFinite: the network returns NaN.
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
      NotFinite: the network returns NaN.
    """
    parts, extras, indices = [], [], []
    with terminal.progress(
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
      raise NotFinite(
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
  """What `evaluate` recorded of the test split, or the same made now.

  Raises:
    UserError: what it recorded is of another model, or cannot be made.
  """
  kept = os.path.join(path, 'report', 'record.npz')
  if os.path.exists(kept):
    record = policies.load(kept)
    names = workdir.class_names(path)
    model = workdir.create_model(workdir.read_config(path).model, names)
    if tuple(record.options) != tuple(model.options):
      raise UserError(
        f'{kept} is of another model than the run: evaluate it again with '
        f'python -m drnet_jax.main --mode=evaluate --workdir={path}'
      )
    return record
  mesh = mesh_lib.create()
  trained = workdir.load(path, mesh)
  return record_split(trained, mesh, *trained.open('test_split'), 'test')


def evaluate(path: str, overrides: Sequence[str] = ()) -> Record:
  """Evaluates the latest weights of a workdir on its test split.

  Prints a table and leaves in `<workdir>/report/`: `record.npz` (what every
  image got at every size), the report made of it (see `report.run_page`;
  `python -m drnet_jax report` makes it again), and a few images to try
  `predict` on as `examples/*.png`.

  Args:
    path: the workdir.
    overrides: '--config.data.<field>=<value>', for data that has moved.

  Raises:
    UserError: the workdir holds no trained model, or the data is not its.
  """
  mesh = mesh_lib.create()
  trained = workdir.load(path, mesh, overrides)
  with processes.main_first('test split'):
    data, source = trained.open('test_split')
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
  workdir.note(path, 'evaluate')
  policies.save(record, os.path.join(directory, 'record.npz'))
  bad = len(source.examples) - len(record.label)
  facts = {
    'origin': trained.origin,
    'unreadable': bad,
    'parameters': sum(x.size for x in jax.tree.leaves(trained.params)),
  }
  settings.write_json(os.path.join(directory, 'evaluation.json'), facts)

  def read_image(i: int) -> np.ndarray:
    # Images that cannot be read are in the split and not in the record.
    encoded = source.examples[record.extra['index'][i]]['image']
    return data.eval_image(encoded, trained.model.image_px)

  pictures.save(record, read_image, directory)
  examples = os.path.join(directory, 'examples')
  os.makedirs(examples, exist_ok=True)
  for i in range(min(_EXAMPLES, len(record.label))):
    name = f'{i}_{trained.class_names[record.label[i]]}.png'.replace('/', '_')
    Image.fromarray(read_image(i)).save(os.path.join(examples, name))
  terminal.say(
    f'\n{data.name}/{data.test_split}, {len(record.label)} images'
    + (f'; {bad} more cannot be read and are left out' if bad else '')
  )
  terminal.say(summary(record))
  page = run_page.write(run.read(path), directory)
  for answer in page.answers:
    terminal.say(f'{answer.question} {answer.short}. {answer.text}')
  terminal.say(f'Report: {os.path.join(directory, FILE)}')


def summary(record: Record) -> str:
  """The table of an evaluation as text."""
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
    terminal.table(rows),
    'Cheapest that is right: '
    + ', '.join(
      f'{100 * count / len(needed):.1f} % {option}'
      for option, count in zip(options, shares, strict=True)
    )
    + '.',
  ]
  for name, rho in policies.rank_correlations(record).items():
    lines.append(f'Rank correlation of chosen size and {name}: {rho:+.2f}.')
  return '\n'.join(lines)


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
