# SPDX-License-Identifier: Apache-2.0
"""Draws trained models of either method on one plot.

    python -m drnet_jax compare --workdirs=runs/a,runs/b --folder=runs/both

Each calibrated model is run by its best policy (`--policy=...`: by one of that
family) for several average costs. A ladder's folder counts as a model. What a
setting scores and costs in multiply-adds is that of the whole test split;
milliseconds are measured here, on files of that split, decoding included: in
bulk or (`--one_by_one`) each image by itself, all settings of all models in
turn, each in the runtime that suits it unless `--runtime` names one. `implied`
and `realised` are speed-ups over the most expensive option of the model. Leaves
`compare.csv` and the figure `compare`: accuracy against multiply-adds, and
against milliseconds.
"""

import collections
import os
from collections.abc import Sequence

from absl import flags

from drnet_jax.commands.flags import RUNTIME, asked
from drnet_jax.errors import UserError

USES = ('policy', 'runtime')
_WORKDIRS = flags.DEFINE_list('workdirs', [], 'Calibrated runs to compare.')
_FOLDER = flags.DEFINE_string('folder', None, 'Output folder.')
_SETTINGS = flags.DEFINE_integer(
  'settings', 6, 'Number of operating points per model.', 2
)
_IMAGES = flags.DEFINE_integer('timed_images', 400, 'Images to time.', 1)
_ROUNDS = flags.DEFINE_integer('timed_rounds', 5, 'Number of timed rounds.', 1)
_SINGLY = flags.DEFINE_bool('one_by_one', False, 'Time each image by itself.')


def run(arguments: Sequence[str]) -> None:
  if not (_WORKDIRS.value and _FOLDER.value):
    raise UserError('give --workdirs, separated by commas, and --folder')
  from drnet_jax import terminal
  from drnet_jax.bench import models
  from drnet_jax.report import plots
  from drnet_jax.tables import write_csv

  os.makedirs(_FOLDER.value, exist_ok=True)
  subjects = [
    models.subject(
      path,
      policy=asked().get('policy', 'best'),
      settings=_SETTINGS.value,
      images=_IMAGES.value,
      runtime=RUNTIME.value,
    )
    for path in _WORKDIRS.value
  ]
  rows = models.measure(subjects, rounds=_ROUNDS.value, singly=_SINGLY.value)
  print(
    terminal.table(
      [
        {
          'model': row['model'],
          'MMACs': f'{1e3 * row["gmacs"]:.4g}',
          'ms': f'{row["ms_per_image"]:.4g}',
          'top-1 %': f'{100 * row["top1"]:.2f}',
          'implied': f'{row["implied"]:.2f}',
          'realised': f'{row["realised"]:.2f}',
          'policy': row['policy'],
        }
        for row in rows
      ]
    )
  )
  path = os.path.join(_FOLDER.value, 'compare')
  write_csv(path + '.csv', rows)
  panels = {}
  for field, scale, label in (
    ('gmacs', 1e3, 'average cost of an image, MMACs'),
    ('ms_per_image', 1, 'time of an image on this machine, ms'),
  ):
    points = collections.defaultdict(list)
    for row in rows:
      points[row['model']].append((scale * row[field], 100 * row['top1']))
    panels[label] = [
      plots.Curve(name, *zip(*sorted(some), strict=True))
      for name, some in points.items()
    ]
  plots.write(panels, path)
  print(f'Written: {path}.csv, .png, .svg')
