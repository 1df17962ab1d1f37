# SPDX-License-Identifier: Apache-2.0
"""Flags that several commands share: absl lets one module define a name.

A command lists in `USES` those that it takes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from drnet_jax.choosing.calibration import CHOICES
from drnet_jax.commands import cli
from drnet_jax.errors import UserError
from drnet_jax.export import DECODINGS, PRECISIONS, RUNTIMES

if TYPE_CHECKING:
  from drnet_jax.choosing.options import Costs
  from drnet_jax.serve.classifier import Classifier

TO = flags.DEFINE_string('to', None, 'Folder to write: export, or a ladder.')
MEASURE = flags.DEFINE_enum(
  'measure',
  None,
  RUNTIMES,
  'Also time each option on this machine, in this runtime: what is followed '
  'without a budget is then the cheapest in milliseconds.',
)
RUNTIME = flags.DEFINE_enum(
  'runtime',
  'auto',
  RUNTIMES,
  'auto: JAX on accelerators and for exits, on CPUs the fastest of what is '
  'installed and agrees with it, tried once.',
)
PRECISION = flags.DEFINE_enum(
  'precision',
  'auto',
  PRECISIONS,
  'What OpenVINO computes in; auto: the fastest that this processor has, if '
  'the answers stay.',
)
BATCH = flags.DEFINE_integer('batch', 1, 'Images at once when timing.', 1)
DECODE = flags.DEFINE_enum(
  'decode',
  None,
  DECODINGS,
  'full (default): one crop of the whole file, as in training. scaled: JPEGs '
  'are decoded at no more than the largest size needs, with a margin; answers '
  'change a little.',
)
_POLICY = flags.DEFINE_enum(
  'policy',
  None,
  CHOICES,
  'Family of policies; default best. router without a budget is the predictor '
  'as trained.',
)
_BUDGETS = {
  'gmacs': flags.DEFINE_float(
    'budget_gmacs', None, 'Average cost per image, GMACs.'
  ),
  'ms': flags.DEFINE_float(
    'budget_ms', None, 'Average cost per image, milliseconds.'
  ),
  'accuracy': flags.DEFINE_float(
    'budget_accuracy', None, 'Top-1 to reach, in [0, 1].'
  ),
}
_SIZE = flags.DEFINE_integer(
  'size', None, 'Run all images at this size, px.', 1
)
_EXIT = flags.DEFINE_integer('exit', None, 'Run all images to this exit.', 1)

A_POLICY = ('policy', *(f'budget_{name}' for name in _BUDGETS))
AN_OPTION = ('size', 'exit')
TIMING = ('measure', 'precision', 'batch')


def check_timing() -> None:
  """Raises UserError where it is said how options are timed, but not to."""
  if not MEASURE.value:
    what = 'options that are not timed (--measure)'
    cli.refuse_beside(what, PRECISION, BATCH)


def measured(load: 'Callable[..., Classifier]') -> 'Costs | None':
  """Milliseconds of each option on this machine, if they are asked for."""
  if not MEASURE.value:
    return None
  from drnet_jax.bench import costs

  how = {'runtime': MEASURE.value, 'precision': PRECISION.value}
  return costs.of_this_machine(load, batch=BATCH.value, **how)


def asked() -> dict[str, Any]:
  """The policy and the budget that were asked for, as `Calibration.find`'s."""
  found = {k: f.value for k, f in _BUDGETS.items() if f.value is not None}
  if _POLICY.value:
    found['policy'] = _POLICY.value
  if sum(map(bool, (found, _SIZE.value, _EXIT.value))) > 1:
    raise UserError(
      '--size and --exit cannot be combined with a policy or a budget, '
      'nor with each other'
    )
  return found


def set_policy(classifier: Any) -> None:
  """Lets a `Classifier` follow what the flags ask for, if they do."""
  found = asked()
  if _SIZE.value:
    classifier.set_size(_SIZE.value)
  elif _EXIT.value:
    classifier.set_exit(_EXIT.value)
  elif found == {'policy': 'router'}:
    if not classifier.contract.routes:
      raise UserError('--policy=router needs a trained predictor')
    classifier.policy = classifier.contract.as_trained
  elif found:
    classifier.set_budget(**found)
