# SPDX-License-Identifier: Apache-2.0
"""A comparison as HTML, for the demo page.

Colours are those of the page's theme (Gradio's CSS variables), so cards follow
it into the dark.
"""

import base64
import html
import io

import numpy as np
from PIL import Image

from drnet_jax.demo.comparer import Comparison, Tried

STYLE = """
#answers .html-container { padding: 0; }
.card { border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 16px; margin-bottom: 16px; background: var(--block-background-fill);
  color: var(--body-text-color); overflow-wrap: anywhere; }
.card h3 { margin: 0 0 12px; font-size: 14px; font-weight: 400;
  color: var(--body-text-color-subdued); }
.card h4 { margin: 20px 0 8px; font-size: 14px; font-weight: 600; }
.card p { margin: 4px 0; font-size: 14px; }
.card .answer { font-size: 22px; margin: 0 0 8px; }
.card img { display: block; width: 100%; aspect-ratio: 1; margin: 0;
  image-rendering: pixelated; }
.card .first { display: grid; gap: 16px;
  grid-template-columns: minmax(0, 240px) minmax(220px, 1fr); }
.card .bar { display: grid; grid-template-columns: 1fr auto; font-size: 14px;
  padding: 3px 8px; margin: 4px 0; border-radius: 4px;
  background: linear-gradient(var(--bar) 0 0) no-repeat 0 0 / var(--share) 100%,
    var(--background-fill-secondary);
  --bar: color-mix(in srgb, var(--color-accent) 40%, transparent); }
.card .options { display: grid; gap: 6px;
  grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); }
.card .option { padding: 6px; border-radius: 6px; font-size: 13px;
  border: 2px solid var(--border-color-primary); }
.card .option.chosen { border-color: var(--color-accent); }
.card .option p { font-size: 13px; margin: 2px 0; }
.card .option b { font-weight: 600; }
.card .other, .card .refusal { color: var(--error-icon-color); }
@media (max-width: 640px) { .card .first { grid-template-columns: 1fr; } }
@media (min-width: 641px) { .card .options {
  grid-template-columns: repeat(auto-fill, 120px); } }
"""


def card(name: str, found: Comparison) -> str:
  """One image: the choice, its picture, the classes, and the other options."""
  answer, last = found.answer, found.last
  bars = ''.join(
    f'<div class="bar" style="--share: {100 * p:.1f}%">'
    f'<span>{html.escape(label)}</span><span>{_percent(p)}</span></div>'
    for label, p in answer.top
  )
  others = ''.join(_option(option, found) for option in found.options)
  side = len(last.view)
  before = ''
  if answer.ran[:-1]:
    before = f'<p>Tried before: {html.escape(", ".join(answer.ran[:-1]))}.</p>'
  return f"""<div class="card" data-option="{html.escape(answer.option)}">
<h3>{html.escape(name)}</h3>
<div class="first">
<div>{_picture(last.view)}
<p>What the network saw: {side} x {side} pixels.</p></div>
<div><p class="answer"><b>{html.escape(answer.name)}</b>
at <b>{html.escape(answer.option)}</b></p>
{before}{bars}{_costs(found)}</div></div>
<h4>What every option says</h4>
<div class="options">{others}</div></div>"""


def refusal(reason: str) -> str:
  """In the place of a card: why there is none."""
  return f"""<div class="card"><p class="refusal" role="alert">
{html.escape(reason)}</p></div>"""


def amount(gmacs: float) -> str:
  """Multiply-adds in the unit in which they are easy to read."""
  if gmacs < 0.1:
    return f'{1e3 * gmacs:.3g} MMACs'
  return f'{gmacs:.3g} GMACs'


def _costs(found: Comparison) -> str:
  answer, full = found.answer, found.full
  whole = full.prediction
  lines = [
    f'{amount(answer.gmacs)} instead of {amount(whole.gmacs)} '
    f'at {html.escape(whole.option)} ({_percent(answer.gmacs / whole.gmacs)})',
    f'{found.ms:.3g} ms instead of {full.ms:.3g} ms '
    f'({_percent(found.ms / full.ms)})',
  ]
  if answer.gmacs < whole.gmacs and found.ms > full.ms:
    lines.append(
      'Not faster here: what runs first takes longer than it saves on this '
      'image.'
    )
  return ''.join(f'<p>{line}</p>' for line in lines)


def _option(option: Tried, found: Comparison) -> str:
  said = option.prediction
  classes = 'option chosen' if option is found.last else 'option'
  # All exits read the same picture.
  exits = said.option.rpartition(': ')[2].startswith('exit')
  picture = '' if exits else _picture(option.view)
  same = said.label == found.answer.label
  return f"""<div class="{classes}">
<p><b>{html.escape(said.option)}</b></p>{picture}
<p class="{'same' if same else 'other'}">{html.escape(said.name)}
{_percent(said.probability)}</p>
<p>{amount(said.gmacs)}<br>{option.ms:.3g} ms</p></div>"""


def _picture(view: np.ndarray) -> str:
  """An image tag that holds its own pixels; drawn large, they stay squares."""
  file = io.BytesIO()
  Image.fromarray(view).save(file, 'PNG')
  data = base64.b64encode(file.getvalue()).decode()
  alt = f'{len(view)} x {len(view)} pixels'
  return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def _percent(share: float) -> str:
  return f'{100 * share:.0f} %'
