# SPDX-License-Identifier: Apache-2.0
"""Writes the report of one evaluated run, or of several, as a page.

    python -m drnet_jax report --workdir=runs/quickstart

`--workdir` is the directory of a run, several of them with commas between, or
the folder of a set of experiments (`set.json`, as `drnet_jax sweep` leaves it).
Of one run it writes what `main` wrote after training; of several a table,
beside the paper's figures where the set is one of the paper's tables. Needs
neither images nor weights. `--policy` and `--budget_*` say which policy the
report is about (default: the cheapest that on held-out images is within .3
points of every option, with 95 % confidence). `--report_to` names
another folder than `report/` in the run, in the set, or in the folder that
several runs have in common.
"""

import os
from collections.abc import Sequence

from absl import flags

from drnet_jax.commands import cli
from drnet_jax.commands.flags import A_POLICY, asked
from drnet_jax.errors import UserError

USES = A_POLICY
_TO = flags.DEFINE_string('report_to', None, 'Folder to write the report to.')


def run(arguments: Sequence[str]) -> None:
  from drnet_jax import terminal
  from drnet_jax.report import evaluated, page, run_page, run_set, set_page

  path = cli.model()
  if isinstance(path, str) and not run_set.is_set(path):
    one = evaluated.read(path, **asked())
    to = _TO.value or one.directory
    report = run_page.write(one, to)
  else:
    if asked():
      raise UserError('--policy and --budget_* are for the report of one run')
    several = run_set.read(path) if isinstance(path, str) else run_set.of(path)
    to = _TO.value or os.path.join(several.path, 'report')
    report = set_page.write(several, to)
  for answer in report.answers:
    terminal.say(f'{answer.question} {answer.short}. {answer.text}')
  terminal.say(f'Report: {os.path.join(to, page.FILE)}')
