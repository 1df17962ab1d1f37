# SPDX-License-Identifier: Apache-2.0
"""The page of `drnet_jax demo`, in Gradio."""

import glob
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from drnet_jax.choosing.policy import describe
from drnet_jax.choosing.search import Point
from drnet_jax.demo import cards
from drnet_jax.demo.comparer import Comparer
from drnet_jax.errors import UserError

# How work is chosen, beside naming an option.
BUDGET, ROUTER = 'best policy for a budget', 'router as trained'
_MOST_IMAGES = 24  # at once: each is timed at every size
_MOST_BYTES = '100mb'  # of a file
_KEPT_S = 3600  # what was dropped on the page is then deleted


def import_gradio():
  """Gradio, kept from reporting home.

  Raises:
    UserError: it is not installed, or cannot be imported.
  """
  os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
  # It asks its own page whether it is up, which no proxy can; nothing else is
  # fetched. Some proxies it cannot even be imported with.
  os.environ['no_proxy'] = os.environ['NO_PROXY'] = '*'
  try:
    import gradio
  except Exception as error:
    if isinstance(error, ModuleNotFoundError) and error.name == 'gradio':
      what = "the page needs Gradio: pip install 'drnet_jax[demo]'"
    else:
      kind, text = type(error).__name__, ' '.join(str(error).split())
      what = f'Gradio is installed, but cannot be imported: {kind}: {text}'
    raise UserError(what) from error
  return gradio


class Answers:
  """What the page says of a model; see `show`.

  Attributes:
    ways: how an option is chosen: BUDGET, ROUTER, or the name of one.
    first_way: that the page opens with; without a choice, the network in full.
  """

  def __init__(self, comparer: Comparer):
    self.comparer = comparer
    self.ways = list(comparer.options)
    if len(comparer.contract.routes) > 1:
      self.ways.insert(0, ROUTER)
    if comparer.budgets:
      self.ways.insert(0, BUDGET)
    chooses = self.ways[0] in (BUDGET, ROUTER)
    self.first_way = self.ways[0 if chooses else -1]

  def show(
    self, paths: Sequence[str], way: str, gmacs: float
  ) -> Iterator[tuple[str, str]]:
    """Answers images one by one, in one of the `ways`; `gmacs` is BUDGET's.

    Yields:
      The cards so far as HTML, and what the budget promises as Markdown.
    """
    promise, policy = '', self.comparer.contract.as_trained
    if way == BUDGET:
      point = self.comparer.promise(gmacs)
      promise, policy = self._promise(point), point.policy
    elif way != ROUTER:
      policy = self.comparer.option(way)
    if not paths:
      yield '<p>Drop an image, or pick an example.</p>', promise
    found = ''
    for path in paths[:_MOST_IMAGES]:
      name = os.path.basename(path)
      try:
        found += cards.card(name, self.comparer.compare(path, policy))
      except UserError as error:
        found += cards.refusal(str(error).replace(path, name))
      yield found, promise
    if len(paths) > _MOST_IMAGES:
      found += cards.refusal(
        f'These are the first {_MOST_IMAGES} of {len(paths)} images. For more: '
        'python -m drnet_jax predict --workdir=... folder/'
      )
      yield found, promise

  def _promise(self, point: Point) -> str:
    calibration = self.comparer.calibration
    pairs = zip(self.comparer.options, point.shares, strict=True)
    shares = ', '.join(f'{name} {100 * share:.0f} %' for name, share in pairs)
    return (
      f'On {calibration.split} this budget costs {cards.amount(point.gmacs)} '
      f'an image and gets {100 * point.top1:.1f} % right: {shares}. Policy: '
      f'{describe(point.policy, calibration.options)}.'
    )


def build(comparer: Comparer, path: str):
  """The page, as `gradio.Blocks`.

  Of the workdir `path` it has the name, and the examples in its report.
  """
  gradio = import_gradio()
  answers = Answers(comparer)
  examples = sorted(glob.glob(os.path.join(path, 'report', 'examples', '*')))
  with gradio.Blocks(
    title='drnet_jax', analytics_enabled=False, delete_cache=(_KEPT_S, _KEPT_S)
  ) as blocks:
    gradio.Markdown(
      f'## drnet_jax: {os.path.basename(os.path.abspath(path))}\n'
      'Every image gets only as much computation as it needs: the policy '
      'decides where it starts and when it stops.'
    )
    # An answer to begin with.
    paths = gradio.State(examples[:1])
    with gradio.Row():
      with gradio.Column(scale=2, min_width=300):
        files = gradio.File(
          label='Images', file_count='multiple', height=140, elem_id='files'
        )
        samples = gradio.Dataset(
          # Pixels, not paths: Gradio serves no files from elsewhere.
          components=[gradio.Image(visible=False, format='png')],
          samples=[[Image.open(path)] for path in examples],
          label='Or an example from the test split',
          type='index',
          visible=bool(examples),
          elem_id='examples',
        )
        way = gradio.Radio(
          answers.ways,
          value=answers.first_way,
          label='How work is chosen',
          elem_id='way',
        )
        budget, unit = _slider(gradio, comparer)
        promise = gradio.Markdown(elem_id='promise')
      with gradio.Column(scale=3, min_width=300):
        html = gradio.HTML(elem_id='answers')
        gradio.Markdown(
          'Milliseconds are measured on this machine just now, one image at a '
          'time, from the crop to the answer, including the choice: the '
          'median of five.'
        )

    def show(dropped: list[str], chosen: str, amount: float):
      gmacs = _within(amount * unit, comparer)
      yield from answers.show(dropped, chosen, gmacs)

    shown = {
      'fn': show,
      'inputs': [paths, way, budget],
      'outputs': [html, promise],
      # One image at a time on the whole machine: they are timed.
      'concurrency_id': 'model',
      'concurrency_limit': 1,
      'show_progress': 'minimal',
    }
    blocks.load(**shown)
    files.change(lambda x: x or [], files, paths).then(**shown)
    samples.click(lambda index: [examples[index]], samples, paths).then(**shown)
    way.input(**shown, trigger_mode='always_last')
    budget.input(lambda: BUDGET, None, way, queue=False).then(
      **shown, trigger_mode='always_last'
    )
  return blocks


def serve(blocks: Any, host: str, port: int) -> None:
  """Serves the page until it is interrupted.

  Raises:
    OSError: the port is taken, or the host not ours.
  """
  gradio = import_gradio()
  blocks.launch(
    server_name=host,
    server_port=port,
    share=False,
    quiet=True,
    footer_links=[],
    max_file_size=_MOST_BYTES,
    # Fonts of the system: others would have to be fetched.
    theme=gradio.themes.Default(
      font=['system-ui', 'sans-serif'], font_mono=['monospace']
    ),
    css=cards.STYLE,
  )


def _slider(gradio, comparer: Comparer) -> tuple[Any, float]:
  """The budget, and the unit that it is shown in, in GMACs."""
  if not comparer.budgets:
    why = 'One policy is the best for every budget.'
    if comparer.calibration is None:
      why = 'Not calibrated: python -m drnet_jax calibrate --workdir=...'
    slider = gradio.Slider(
      label='Average budget', info=why, interactive=False, elem_id='budget'
    )
    return slider, 1.0
  low, high = comparer.budgets
  unit, name = (1e-3, 'MMACs') if high < 0.1 else (1.0, 'GMACs')
  digits = max(0, 2 - math.floor(math.log10((high - low) / unit)))

  def shown(gmacs: float) -> float:
    # Never less: a budget just under a policy's cost is one for another.
    return math.ceil(gmacs / unit * 10**digits) / 10**digits

  slider = gradio.Slider(
    minimum=shown(low),
    maximum=shown(high),
    step=10**-digits,
    value=shown(min(comparer.calibration.find().gmacs, high)),
    label=f'Average budget, {name} an image',
    elem_id='budget',
  )
  return slider, unit


def _within(gmacs: float, comparer: Comparer) -> float:
  """A budget of the slider, whose ends are rounded."""
  low, high = comparer.budgets or (gmacs, gmacs)
  return min(max(gmacs, low), high)
