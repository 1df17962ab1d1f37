# SPDX-License-Identifier: Apache-2.0
"""What a model says of a split: every image once, at every option."""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from drnet_jax import mesh as mesh_lib
from drnet_jax import processes, settings, terminal
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing.options import Costs, Options
from drnet_jax.choosing.record import Record
from drnet_jax.data.pipeline import ASIDE, Data
from drnet_jax.data.sources import Source
from drnet_jax.errors import NotFinite, NotHeldOut, UserError
from drnet_jax.models import Model
from drnet_jax.run import paths, workdir

_ON_DEVICE = ('image', 'label', 'valid')  # all else of a batch is extra
# Fields of `config.data` on which a record does not depend.
_CHANGES_NOTHING = ('threads', 'workers', 'max_bad_images')


class Evaluator:
  """Records what a model says of a split; compiled once for all its calls."""

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
    self._options = Options.of(model.options)
    self._costs = Costs(
      'GMACs', macs.gmacs, macs.predictor / 1e9, 'multiply-adds of the jaxpr'
    )

  def __call__(
    self,
    data: Data,
    source: Source,
    description: str,
    params,
    batch_stats,
    *,
    batch_size: int,
    has_router: bool,
    keep_probabilities: bool = False,
  ) -> Record:
    """Runs the model over a split, each process over its part of it.

    Args:
      data: that reads the images of the split, `source`.
      description: for the progress bar and for errors.
      params, batch_stats: of the model.
      batch_size: images at a time, over all devices.
      has_router: whether the predictor has been trained.
      keep_probabilities: for records that will be joined.

    Raises:
      RuntimeError: the batches did not hold each image once.
      NotFinite: the network returns NaN.
    """
    batches = data.eval_batches(
      source,
      size_px=self._model.image_px,
      batch_size=batch_size,
      process=jax.process_index(),
      num_processes=jax.process_count(),
    )
    num_examples = len(source.examples)
    parts, extras, indices, queued = [], [], [], []
    columns = self._options.columns
    with terminal.progress(
      total=num_examples, desc=description, unit='img', leave=False
    ) as bar:
      for batch in batches:
        valid = batch['valid']
        indices.append(batch['index'])
        extra = {k: v[valid] for k, v in batch.items() if k not in _ON_DEVICE}
        extra['draw'] = [record_lib.checksum(x) for x in batch['image'][valid]]
        extras.append(extra)
        on_device = mesh_lib.shard_batch(
          {k: batch[k] for k in _ON_DEVICE}, self._mesh
        )
        # Fetched a batch later, so that the device always has work queued.
        queued.append(self._judge(has_router, params, batch_stats, on_device))
        if len(queued) > 1:
          parts.append(_fetch(queued.pop(0), columns, keep_probabilities))
        bar.update(len(valid) * jax.process_count())
    parts.append(_fetch(queued.pop(), columns, keep_probabilities))
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
    return Record(
      **{'log_p': None} | fields,
      options=self._options,
      costs=self._costs,
      columns=columns,
      draw=extra.pop('draw'),
      extra=extra,
    )


class Subject:
  """A trained run, ready to be recorded on its splits.

  `path` and `overrides` are those of `workdir.read_config`.

  Attributes:
    trained: its latest weights.
    data: of its config.
  """

  def __init__(self, path: str, overrides: Sequence[str] = ()):
    if (root := paths.root(path)) != path:
      raise UserError(
        f'{path} is one checkpoint: name the workdir, {root}; its latest '
        'weights are recorded'
      )
    mesh = mesh_lib.create()
    self.path = path
    self.trained = workdir.load(path, mesh, overrides)
    config = self.trained.config
    mesh_lib.check_batch(config.eval_batch_size, mesh, 'config.eval_batch_size')
    self.data = settings.call(Data, config.data, 'config.data')
    self._evaluator = Evaluator(self.trained.model, mesh)
    self._sources: dict[str, Source] = {}

  def record(
    self, split: str, description: str, *, keep_probabilities: bool = False
  ) -> Record:
    """Runs the model once over a split; see `Evaluator`."""
    trained = self.trained
    source = self.source(split)
    record = self._evaluator(
      self.data,
      source,
      description,
      trained.params,
      trained.batch_stats,
      batch_size=trained.config.eval_batch_size,
      has_router=trained.has_router,
      keep_probabilities=keep_probabilities,
    )
    return dataclasses.replace(record, origin=self.origin(split))

  def source(self, split: str) -> Source:
    """The images of a split, of the model's classes; opened once."""
    if split not in self._sources:
      with processes.main_first(f'split {split}'):
        source = self.data.open(split, self.trained.class_names)
      if split in ASIDE:
        workdir.check_held_out(self.path, source.examples)
      self._sources[split] = source
    return self._sources[split]

  def learnt_from(self, split: str) -> bool:
    """Whether the model was trained on the images of a split."""
    return split == self.data.train_split and workdir.has_trained(self.path)

  def unreadable(self, record: Record) -> int:
    """How many images of the test split are not in its record."""
    source = self.source(self.data.test_split)
    return len(source.examples) - len(record.label)

  def origin(self, split: str) -> str:
    """Which weights and which images a record of a split is of."""
    examples = self.source(split).examples
    names = '\n'.join(map(examples.name, range(len(examples))))
    return self._origin(split, f', images {zlib.crc32(names.encode()):08x}')

  def _origin(self, split: str, images: str = '') -> str:
    trained = self.trained
    shown = settings.plain(trained.config.data)
    shown = {k: v for k, v in shown.items() if k not in _CHANGES_NOTHING}
    data = zlib.crc32(json.dumps(shown, sort_keys=True).encode())
    return (
      f'{trained.origin}, weights {trained.digest}; data {data:08x}{images}; '
      f'{self.data.name}/{split}'
    )

  def is_current(self, record: Record | None, split: str) -> bool:
    """Whether a record is of these weights and of this split.

    Where the images are not at hand, they are taken to be those they were.
    """
    of = record.origin if record else ''
    if re.sub(r', images \w+', '', of) != self._origin(split):
      return False
    try:
      return of == self.origin(split)
    except UserError as error:
      # Of several processes the others wait for the first to open a split.
      if isinstance(error, NotHeldOut) or jax.process_count() > 1:
        raise
      return True

  def test_record(self) -> Record:
    """What `evaluate` recorded of the test split, made again if stale."""
    split = self.data.test_split
    kept = os.path.join(self.path, workdir.TEST_RECORD)
    record = record_lib.load(kept) if os.path.exists(kept) else None
    if self.is_current(record, split):
      return record
    return self.record(split, 'test')

  def keep(self, record: Record) -> None:
    """Writes a record of the test split, and what else a report says of it."""
    file = os.path.join(self.path, workdir.TEST_RECORD)
    folder = os.path.dirname(file)
    os.makedirs(folder, exist_ok=True)
    # They are called by their places in the record that was there before.
    shutil.rmtree(os.path.join(folder, workdir.PICTURES), ignore_errors=True)
    record_lib.save(record, file)
    workdir.note(self.path, 'evaluate')
    facts = {
      'origin': self.trained.origin,
      'unreadable': self.unreadable(record),
      'parameters': sum(x.size for x in jax.tree.leaves(self.trained.params)),
    }
    settings.write_json(os.path.join(self.path, workdir.EVALUATION), facts)


def _judge(
  model: Model, mesh: Mesh, has_router: bool, params, batch_stats, batch
):
  """Of one batch, all that `_fetch` makes fields of a `Record` from."""
  images, labels = batch['image'], batch['label']
  params = mesh_lib.gathered(params, mesh)
  logits = model.all_logits(params, batch_stats, images)  # [B, R, K]
  of_label = jnp.take_along_axis(logits, labels[:, None, None], -1)
  judged = {
    'valid': batch['valid'],
    'label': labels,
    'probabilities': jax.nn.softmax(logits),
    'top5': (logits > of_label).sum(-1) < 5,
  }
  if has_router:
    scores, _ = model.predict(
      params['predictor'], batch_stats['predictor'], images, train=False
    )
    judged['log_p'] = jax.nn.log_softmax(scores)
  return judged


def _fetch(
  judged: dict[str, jax.Array], columns, keep_probabilities: bool
) -> dict[str, np.ndarray]:
  """Fields of a `Record` for the valid images of a batch."""
  valid = np.asarray(judged['valid'])
  found = {k: np.asarray(v)[valid] for k, v in judged.items() if k != 'valid'}
  probabilities, alone = found.pop('probabilities'), found.pop('top5')
  if keep_probabilities:
    found['probabilities'] = probabilities
  said = record_lib.said(probabilities, found['label'], columns)
  # For single options by the logits: small probabilities may be equal.
  said['top5'][:, : alone.shape[1]] = alone
  return found | said
