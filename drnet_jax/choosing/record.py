# SPDX-License-Identifier: Apache-2.0
"""What every option, and the predictor, said of each image of a split.

One record serves sizes, exits and several networks. All policies are judged on
it: on the same weights and the same images.
"""

import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from drnet_jax.choosing.options import Costs, Options
from drnet_jax.errors import DAMAGED_ZIP, UserError

_EXTRA = 'extra.'  # prefix of an example's other fields, in a file
_GROUP = 'original'  # field of the examples that are copies of one original
_REMEDY = 'delete it, then evaluate or calibrate the run again'
# Fields that a file holds as they are: in every version of it, and in some.
_ALWAYS = ('label', 'predicted', 'confidence', 'top5')
_SOMETIMES = ('margin', 'log_p', 'draw')
_SAID = ('predicted', 'confidence', 'margin', 'top5')  # by every column


@dataclasses.dataclass(frozen=True)
class Record:
  """See the module. A column is an option, or the mean of several.

  Attributes:
    options: what is chosen among, R of them.
    costs: of each, in GMACs.
    label: int [N].
    columns: [A], the options that each column is the mean of; the first R are
      the options alone. Records of version 0.4 have no others.
    predicted: int [N, A], class of each column.
    confidence: float32 [N, A], probability of that class.
    margin: float32 [N, A], that less the second largest probability; None in
      records of version 0.4.
    top5: bool [N, A], the label is among the five likeliest classes.
    log_p: float32 [N, R], the predictor's log-probabilities, -inf of options it
      does not know; None where no predictor has been trained.
    draw: float64 [N] in [0, 1), a checksum of the pixels, by which a dial that
      mixes two settings tells images apart; None in older records.
    extra: other fields of the examples, [N] each; 'index' is the place in the
      split.
    origin: which weights and which images, see `run.recording.Subject.origin`;
      '' in older records.
    probabilities: float32 [N, R, K], kept for `join`; not stored.
  """

  options: Options
  costs: Costs
  label: np.ndarray
  columns: tuple[tuple[int, ...], ...]
  predicted: np.ndarray
  confidence: np.ndarray
  margin: np.ndarray | None
  top5: np.ndarray
  log_p: np.ndarray | None
  draw: np.ndarray | None
  extra: Mapping[str, np.ndarray]
  origin: str = ''
  probabilities: np.ndarray | None = None

  @property
  def right(self) -> np.ndarray:
    """bool [N, A], whether each column names the label."""
    return self.predicted == self.label[:, None]

  @property
  def top1(self) -> np.ndarray:
    """bool [N, R], of the options alone."""
    return self.right[:, : len(self.options)]

  @property
  def gmacs(self) -> np.ndarray:
    """float64 [R], of each option alone."""
    return np.asarray(self.costs.options, np.float64)

  @property
  def choice(self) -> np.ndarray:
    """int [N], index of the option the predictor finds likeliest."""
    return self.log_p.argmax(1)

  @property
  def groups(self) -> np.ndarray:
    """int [N] from 0: images of one number are not independent."""
    found = self.extra.get(_GROUP)
    if found is None:
      return np.arange(len(self.label))
    return np.unique(found, return_inverse=True)[1]

  def is_of_images_of(self, other: 'Record') -> bool:
    """Whether both are of the same images, in the same order."""
    return np.array_equal(self.label, other.label) and np.array_equal(
      self.extra.get('index'), other.extra.get('index')
    )

  def signal(self, name: str) -> np.ndarray:
    """float32 [N, A]: 'margin' or 'probability', how sure a column is."""
    return self.margin if name == 'margin' else self.confidence

  def column(self, options: Sequence[int]) -> int:
    """Index of the column of these options; KeyError if there is none."""
    try:
      return self.columns.index(tuple(sorted(options)))
    except ValueError:
      raise KeyError(f'no mean of the options {tuple(options)}') from None

  def some(self, rows: slice | np.ndarray) -> 'Record':
    """The record of some of the images."""
    changes = {
      name: value[rows]
      for name, value in vars(self).items()
      if isinstance(value, np.ndarray)
    }
    extra = {k: v[rows] for k, v in self.extra.items()}
    return dataclasses.replace(self, **changes, extra=extra)


def said(
  probabilities: np.ndarray,
  label: np.ndarray,
  columns: Sequence[tuple[int, ...]],
) -> dict[str, np.ndarray]:
  """What columns, means of options, say: fields of a `Record`, [N, A] each.

  Of probabilities, float32 [N, R, K], of images whose labels are int [N].
  """
  rows, parts = np.arange(len(label)), []
  for options in columns:
    mean = pooled([probabilities[:, j] for j in options])
    likelier = (mean > mean[rows, label][:, None]).sum(-1)
    predicted = mean.argmax(-1).astype(np.int32)
    parts.append((predicted, *signals(mean), likelier < 5))
  arrays = (np.stack(x, 1) for x in zip(*parts, strict=True))
  return dict(zip(_SAID, arrays, strict=True))


def pooled(probabilities: Sequence[np.ndarray]) -> np.ndarray:
  """Mean of float32 arrays, in the order in which they are given."""
  total = probabilities[0]
  for more in probabilities[1:]:
    total = total + more
  return total / np.float32(len(probabilities))


def signals(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Largest of [N, K] probabilities, and how far above the second: [N] each."""
  first = probabilities.max(-1)
  if probabilities.shape[-1] == 1:
    return first, first
  rest = probabilities.copy()  # faster than `numpy.partition`
  rest[np.arange(len(rest)), probabilities.argmax(-1)] = -np.inf
  return first, first - rest.max(-1)


def checksum(image: np.ndarray) -> float:
  """Of an image's pixels, uint8 [H, W, 3], in [0, 1)."""
  return zlib.crc32(image) / 2**32


def join(records: Mapping[str, Record]) -> Record:
  """Several networks' records of the same images, with probabilities, as one.

  The predictor is that of the first network that has one.

  Raises:
    ValueError: they are of other images, or classes.
  """
  several = list(records.values())
  first = several[0]
  for other in several[1:]:
    if not first.is_of_images_of(other):
      raise ValueError('the records are of other images')
  options = Options.join({name: r.options for name, r in records.items()})
  probabilities = np.concatenate([r.probabilities for r in several], 1)
  router = next((r for r in several if r.log_p is not None), None)
  log_p = None
  if router is not None:
    unknown = np.float32(-np.inf)
    parts = [
      r.log_p if r is router else np.full(r.top1.shape, unknown)
      for r in several
    ]
    log_p = np.concatenate(parts, 1)
  columns = options.columns
  return Record(
    options=options,
    costs=Costs(
      unit=first.costs.unit,
      options=sum((r.costs.options for r in several), ()),
      predictor=router.costs.predictor if router else 0.0,
      source=first.costs.source,
    ),
    label=first.label,
    columns=columns,
    **said(probabilities, first.label, columns),
    log_p=log_p,
    draw=(router or first).draw,
    extra=first.extra,
    origin='; '.join(r.origin for r in several),
    probabilities=probabilities,
  )


def save(record: Record, path: str) -> None:
  """Writes a record as one npz file, without pickles or probabilities."""
  costs = record.costs
  arrays = {
    'options': np.array(record.options.names),
    'chain': np.array(record.options.chain),
    'gmacs': np.array(costs.options),
    'predictor_gmacs': costs.predictor,
    'source': costs.source,
    'columns': np.array([' '.join(map(str, c)) for c in record.columns]),
    'origin': record.origin,
  }
  for name in (*_ALWAYS, *_SOMETIMES):
    if (array := getattr(record, name)) is not None:
      arrays[name] = array
  extra = {_EXTRA + k: v for k, v in record.extra.items()}
  partial = f'{path}.{os.getpid()}.partial'
  with open(partial, 'wb') as file:  # a name would get another ending
    np.savez_compressed(file, **arrays, **extra)
  os.replace(partial, path)


def load(path: str) -> Record:
  """Reads what `save` wrote, or what versions 0.2 to 0.4 did.

  Raises:
    UserError: it is damaged.
  """
  try:
    with np.load(path) as file:
      arrays = dict(file)
  except DAMAGED_ZIP as error:
    raise UserError(f'{path} is damaged ({error}): {_REMEDY}') from error
  if 'resolutions' in arrays:  # as files of version 0.2 call it
    arrays['options'] = [f'{r} px' for r in arrays['resolutions']]
  needed = {'options', 'gmacs', 'predictor_gmacs', *_ALWAYS}
  if missing := needed - arrays.keys():
    raise UserError(f'{path} lacks {", ".join(sorted(missing))}: {_REMEDY}')
  try:
    record = _of_arrays(arrays)
    fits = _fits_together(record)
  except (TypeError, ValueError):  # of one kind where another should be
    fits = False
  if not fits:
    raise UserError(
      f'{path} is damaged, its parts do not fit together: {_REMEDY}'
    )
  return record


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> Record:
  options = Options.of(arrays['options'])
  if 'chain' in arrays:
    options = Options(options.names, tuple(arrays['chain'].tolist()))
  columns = tuple((j,) for j in range(len(options)))
  if 'columns' in arrays:
    columns = tuple(tuple(map(int, c.split())) for c in arrays['columns'])
  return Record(
    options=options,
    costs=Costs(
      unit='GMACs',
      options=tuple(map(float, arrays['gmacs'])),
      predictor=float(arrays['predictor_gmacs']),
      source=str(arrays.get('source', 'multiply-adds of the jaxpr')),
    ),
    columns=columns,
    **{name: arrays.get(name) for name in (*_ALWAYS, *_SOMETIMES)},
    extra={
      name.removeprefix(_EXTRA): value
      for name, value in arrays.items()
      if name.startswith(_EXTRA)
    },
    origin=str(arrays.get('origin', '')),
  )


def _fits_together(record: Record) -> bool:
  options = len(record.options)
  shape = (len(record.label), len(record.columns))
  by_column = [getattr(record, name) for name in _SAID]
  by_image = [record.log_p, record.draw, *record.extra.values()]
  return (
    len(record.costs.options) == options > max(map(max, record.columns))
    and all(x.shape == shape for x in by_column if x is not None)
    and all(x.shape[:1] == shape[:1] for x in by_image if x is not None)
  )
