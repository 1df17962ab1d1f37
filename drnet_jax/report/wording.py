# SPDX-License-Identifier: Apache-2.0
"""What a comparison says, in words and figures for people."""

import dataclasses
import math

from drnet_jax.report import plots
from drnet_jax.report.compare import Comparison, Interval, Scored
from drnet_jax.report.policies import Record


@dataclasses.dataclass(frozen=True)
class Answer:
  """To a question that a reader has.

  Attributes:
    question: of the reader.
    short: the answer in a word or a figure.
    text: the answer in full.
  """

  question: str
  short: str
  text: str


def percent(share: float | None, digits: int = 1) -> str:
  """'91.4', or '' where it is not defined."""
  return (
    '' if share is None or math.isnan(share) else f'{100 * share:.{digits}f}'
  )


def percent_interval(share: Interval) -> str:
  """'91.4 [90.5, 92.3]'."""
  return f'{percent(share.value)} [{percent(share.low)}, {percent(share.high)}]'


def points(difference: Interval) -> str:
  """'+2.8 [+2.4, +3.2]', in percentage points; '' where it is not defined."""
  if math.isnan(difference.value):
    return ''
  parts = (difference.value, difference.low, difference.high)
  value, low, high = (f'{100 * x + 0.0:+.1f}' for x in parts)
  return f'{value} [{low}, {high}]'


def cost(gmacs: float, record: Record) -> str:
  """'6.68 MMACs'."""
  scale, unit = plots.unit(record)
  return f'{figures(scale * gmacs)} {unit}'


def figures(value: float) -> str:
  """Three of them: '6.70', '13.5', '100'."""
  return f'{value:#.3g}'.rstrip('.')


def answers(found: Comparison, record: Record) -> list[Answer]:
  """What a stranger asks of a router first."""
  return [
    Answer(
      'How much does routing save?',
      f'{percent(found.saving.value)} %'
      if found.saving.value > 0
      else 'Nothing',
      _saving(found, record),
    ),
    Answer('Against what?', _all_at(found.full), _rivals(found, record)),
    Answer('Is the gain real?', *_gain(found, record)),
  ]


def _all_at(fixed: Scored) -> str:
  return f'all images at {fixed.name.removeprefix("fixed ")}'


def _saving(found: Comparison, record: Record) -> str:
  router, full = found.router, found.full
  predictor = (
    f', {cost(record.predictor_gmacs, record)} of it the predictor'
    if record.predictor_gmacs
    else ''
  )
  text = (
    f'An image takes {cost(router.gmacs.value, record)} on average{predictor}; '
    f'with {_all_at(full)} it is {cost(full.gmacs.value, record)}. Saved: '
    f'{percent_interval(found.saving)} % of the multiply-adds. Top-1 goes from '
    f'{percent(full.top1.value)} to {percent(router.top1.value)} %: '
    f'{points(full.gain)} points.'
  )
  if found.collapsed is not None:
    share = router.shares[found.collapsed]
    text += (
      f' {percent(share)} % of the images go to '
      f'{record.options[found.collapsed]}: this router hardly chooses.'
    )
  else:
    text += ''.join(
      f' {record.options[j]} is hardly used: {percent(router.shares[j])} % of '
      'the images.'
      for j in found.rare
    )
  return text


def _rivals(found: Comparison, record: Record) -> str:
  rivals = [
    (f'the best fixed {record.noun} or mixture of two', found.best_fixed),
    (f'{record.noun}s drawn at random', found.random),
  ]
  if found.cascade:
    rivals.append(
      (
        'a confidence cascade (go on to the next size while unsure)',
        found.cascade,
      )
    )
  scores = '; '.join(
    f'{name} {percent(rival.top1.value)} %' for name, rival in rivals
  )
  return (
    f'The saving is against the same network with {_all_at(found.full)}.'
    f'{_against_best_single(found, record)} Rivals at the cost of the router '
    f'and on the same weights: {scores}. The router: '
    f'{percent(found.router.top1.value)} %.'
  )


def _against_best_single(found: Comparison, record: Record) -> str:
  """Where the dearest size is not the best one."""
  best = found.best_single
  if best is found.full:
    return ''
  saved = 1 - found.router.gmacs.value / best.gmacs.value
  saves = (
    f'saves {percent(saved)} %'
    if saved > 0
    else f'costs {percent(-saved)} % more'
  )
  return (
    f' But {best.name.removeprefix("fixed ")} alone is the best {record.noun} '
    f'here: {percent(best.top1.value)} % at '
    f'{cost(best.gmacs.value, record)}. Against that the router {saves} and '
    f'gains {points(best.gain)} points.'
  )


def _gain(found: Comparison, record: Record) -> tuple[str, str]:
  """In a word, and in full."""
  gain = found.best_fixed.gain
  rival = f'the best fixed {record.noun} at the same cost'
  by = f'{points(gain)} points'
  if gain.sign > 0:
    short = _yes(found.cascade)
    text = f'It beats {rival} by {by}; the interval lies above zero.'
  elif gain.sign < 0:
    short = 'No, it loses'
    text = f'Over {rival}, or a lower one, it gains {by}.'
  else:
    short = 'No'
    text = f'Over {rival} it gains {by}: the interval contains zero.'
  text += f' Over {record.noun}s at random: {points(found.random.gain)}.'
  if found.cascade:
    text += f' Over the cascade: {_against(found.cascade)}.'
  return short, f'{text} All of one training run: another may differ.'


def _yes(cascade: Scored | None) -> str:
  """That a gain over fixed sizes is real, and what else must be said."""
  sign = 1 if cascade is None else cascade.gain.sign
  return {
    1: 'Yes',
    0: 'Yes, but not over a cascade',
    -1: 'Yes, but a cascade is better',
  }[sign]


def _against(rival: Scored) -> str:
  says = {
    1: 'the router is better',
    0: 'the interval contains zero',
    -1: 'the cascade is better',
  }
  return f'{points(rival.gain)} ({says[rival.gain.sign]})'
