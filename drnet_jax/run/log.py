# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: one tidy csv, and TensorBoard events.

Of the processes of a run only the main one writes.
"""

import csv
import os
from collections.abc import Mapping

from tensorboardX import SummaryWriter

from drnet_jax import processes

_HEADER = ['stage', 'step', 'metric', 'value']


class MetricWriter:
  """Appends scalars to `metrics.csv` and to TensorBoard event files.

  The csv is in long form (stage, step, metric, value), so that any step may
  report any metrics. It holds only what a repeated run would reproduce; rates
  go to TensorBoard alone.

  Args:
    workdir: of the run.
    stage: name of the stage, first column and prefix in TensorBoard.
    start_step: rows of this stage beyond it, which a run that was cut off
      logged, are dropped: those steps are about to be taken again.
    later_stages: stages of which nothing may be left.
  """

  def __init__(
    self, workdir: str, stage: str, start_step: int, later_stages: list[str]
  ):
    self._stage = stage
    path, kept = os.devnull, []
    if processes.is_main():
      path = os.path.join(workdir, 'metrics.csv')
      if os.path.exists(path):
        with open(path, newline='') as file:
          # A killed process can leave a part of a row at the end.
          rows = [row for row in csv.reader(file) if len(row) == len(_HEADER)]
        kept = [
          row
          for row in rows[1:]
          if row[0] not in later_stages
          and (row[0] != stage or int(row[1]) <= start_step)
        ]
      with open(path + '.partial', 'w', newline='') as file:
        csv.writer(file).writerows([_HEADER, *kept])
      os.replace(path + '.partial', path)
    self._file = open(path, 'a', newline='')
    self._csv = csv.writer(self._file)
    self._events = SummaryWriter(
      os.path.join(workdir, 'tensorboard', stage),
      purge_step=start_step + 1,
      write_to_disk=processes.is_main(),
    )

  def write(
    self,
    step: int,
    metrics: Mapping[str, float],
    rates: Mapping[str, float] | None = None,
  ) -> None:
    """Records metrics of a step, by name; `rates` are not for the csv."""
    for name, value in metrics.items():
      self._csv.writerow([self._stage, step, name, repr(float(value))])
    for name, value in {**metrics, **(rates or {})}.items():
      self._events.add_scalar(name, value, step)
    self._file.flush()

  def close(self) -> None:
    self._file.close()
    self._events.close()
