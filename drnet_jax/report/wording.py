# SPDX-License-Identifier: Apache-2.0
"""What a judgement says, in words and figures for people."""

import math
from typing import NamedTuple

from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.record import Record
from drnet_jax.choosing.scores import Interval, Judgement

_COLLAPSED = 0.95  # of the images at one option


class Answer(NamedTuple):
  """To a reader's question: in a word or a figure, and in full."""

  question: str
  short: str
  text: str


def percent(share: float | None, digits: int = 1) -> str:
  """'91.4', or '' where it is not defined."""
  if share is None or math.isnan(share):
    return ''
  return f'{100 * share:z.{digits}f}'


def percent_interval(share: Interval) -> str:
  """'91.4 [90.5, 92.3]'."""
  return f'{percent(share.value)} [{percent(share.low)}, {percent(share.high)}]'


def points(difference: Interval | None) -> str:
  """'+2.8 [+2.4, +3.2]', in percentage points; '' where it is not defined."""
  if difference is None or math.isnan(difference.value):
    return ''
  parts = (difference.value, difference.low, difference.high)
  value, low, high = (f'{100 * x:+z.1f}' for x in parts)
  return f'{value} [{low}, {high}]'


def cost(gmacs: float, record: Record) -> str:
  """'6.68 MMACs'."""
  scale, name = unit(record)
  return f'{three_digits(scale * gmacs)} {name}'


def unit(record: Record) -> tuple[float, str]:
  """What costs are shown in: the factor from GMACs, and its name."""
  return (1.0, 'GMACs') if record.costs.full >= 0.1 else (1e3, 'MMACs')


def three_digits(value: float) -> str:
  """'6.70', '13.5', '100'."""
  return f'{value:#.3g}'.rstrip('.')


def answers(judged: Judgement, record: Record, policy: Policy) -> list[Answer]:
  """What a stranger asks of a policy first."""
  found, full = judged.policy, judged.full
  saving = round(judged.saving.value, 9)  # of a fixed size a mean is not exact
  all_full = f'all images at {full.name.removeprefix("fixed ")}'
  overhead = record.costs.predictor if policy.start else 0.0
  predictor = (
    f', {cost(overhead, record)} of it the predictor' if overhead else ''
  )
  ends = ', '.join(
    f'{percent(found.shares[j])} % at {record.options.names[j]}'
    for j in policy.path
  )
  parts = [*policy_lib.details(policy), f'images end: {ends}']
  how = ' '.join(f'{part[0].upper()}{part[1:]}.' for part in parts)
  if len(policy.path) > 1 and found.shares.max() > _COLLAPSED:
    how += ' This policy has collapsed onto one option.'
  return [
    Answer(
      'What do I save?',
      f'{percent(saving)} % of the work' if saving > 0 else 'Nothing',
      f'An image takes {cost(found.gmacs.value, record)} on average{predictor}'
      f', and {cost(full.gmacs.value, record)} with {all_full}. Saved: '
      f'{percent_interval(judged.saving)} % of the multiply-adds.',
    ),
    Answer(
      'At what accuracy?',
      f'{percent(found.top1.value)} %',
      f'Top-1, against {percent(full.top1.value)} % with {all_full}: '
      f'{points(full.gain)} points.{_against_best_single(judged, record)}',
    ),
    Answer('Is the gain real?', *_gain(judged, record, policy)),
    Answer('How?', policy_lib.name(policy, record.options), how),
  ]


def _against_best_single(judged: Judgement, record: Record) -> str:
  """Where the most expensive option is not the best one."""
  best = judged.best_single
  saved = round(1 - judged.policy.gmacs.value / best.gmacs.value, 9)
  if best is judged.full or not (saved or best.gain.value):
    return ''
  saves = (
    f'saves {percent(saved)} %'
    if saved > 0
    else f'costs {percent(-saved)} % more'
  )
  return (
    f' But {best.name.removeprefix("fixed ")} alone is the best '
    f'{record.options.noun} here: {percent(best.top1.value)} % at '
    f'{cost(best.gmacs.value, record)}. Against that the {judged.policy.name} '
    f'{saves} and gains {points(best.gain)} points.'
  )


def _gain(judged: Judgement, record: Record, policy: Policy) -> tuple[str, str]:
  """In a word, and in full."""
  noun = record.options.noun
  if policy.family == 'fixed':
    return 'There is none', f'All images end at one {noun}.'
  best, at_most = judged.best_fixed, judged.policy.gmacs.high
  rival = (
    f'the best fixed {noun} at the same cost, {percent(best.top1.value)} %,'
  )
  by = f'{points(best.gain)} points'
  better = [  # and not because it may cost more
    name
    for name, other in judged.others.items()
    if other.gain.sign < 0 and other.gmacs.value <= at_most
  ]
  if best.gain.sign > 0:
    short = f'Yes, but the {better[0]} is better' if better else 'Yes'
    text = f'It is ahead of {rival} by {by}; the interval lies above zero.'
  elif best.gain.sign < 0:
    short = 'No, it loses'
    text = f'Against {rival} it loses: {by}.'
  else:
    short = 'Not shown'
    text = f'Over {rival} it gains {by}: the interval contains zero.'
  rivals = {f'{noun}s at random': judged.random}
  rivals |= {f'the {name}': other for name, other in judged.others.items()}
  listed = []
  for name, other in rivals.items():
    costs_more = other.gmacs.value > at_most
    more = f' (at {cost(other.gmacs.value, record)})' if costs_more else ''
    listed.append(f'{name} {100 * other.gain.value:+z.1f}{more}')
  over = ', '.join(listed)
  return short, f'{text} Over {over}. One training run: another may differ.'
