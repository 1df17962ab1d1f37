# SPDX-License-Identifier: Apache-2.0
"""What the demo page says is what the classifier says."""

import concurrent.futures
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import tiny_trained
from drnet_jax.serve.budget import Calibration, Costs
from drnet_jax.serve.exit_budget import ExitCalibration
from PIL import Image
from test_classifier import pictures
from test_early_exit import pictures as small_pictures
from test_early_exit import trained as trained_exits  # noqa: F401

from drnet_jax.demo import cards, page
from drnet_jax.demo.comparer import Comparer
from drnet_jax.demo.page import BUDGET, OWN
from drnet_jax.errors import UserError
from drnet_jax.models import resolution_norm
from drnet_jax.serve.classifier import Classifier


def calibration_of(trained, images):
  """The dial of a model, as if every size were right."""

  @jax.jit
  def log_p(images):
    params, stats = (
      trained.params['predictor'],
      trained.batch_stats['predictor'],
    )
    scores, _ = trained.model.predict(params, stats, images, train=False)
    return jax.nn.log_softmax(scores)

  macs = trained.model.macs()
  return Calibration(
    np.asarray(log_p(images)),
    np.ones((len(images), len(macs.gmacs)), bool),
    Costs('GMACs', macs.gmacs, macs.predictor / 1e9, ''),
    None,
    'a test',
  )


@pytest.fixture(scope='module')
def trained():
  return tiny_trained()


@pytest.fixture(scope='module')
def comparer(trained):
  return Comparer(trained, calibration=calibration_of(trained, pictures(200)))


@pytest.fixture(scope='module')
def classifier(trained):
  return Classifier.of(trained, batch=1)


def test_numbers_are_those_of_the_classifier(comparer, classifier):
  sizes = classifier.contract.resolutions
  chosen = set()
  for image in pictures(12, seed=5):
    found = comparer.compare(image)
    (expected,) = classifier.predict([image])
    assert found.answer.option == expected.option
    assert found.answer.gmacs == expected.gmacs
    assert found.answer.top == expected.top
    assert found.chosen is found.options[sizes.index(expected.size_px)]
    chosen.add(expected.size_px)
    for size_px, option in zip(sizes, found.options, strict=True):
      fixed = Classifier(classifier.contract, classifier.engine)
      fixed.set_size(size_px)
      (alone,) = fixed.predict([image])
      assert option.prediction.top == alone.top
      assert option.prediction.gmacs == alone.gmacs
      assert 0 < option.ms < 1000
    assert found.full.prediction.size_px == sizes[-1]
    assert found.ms > 0
  assert len(chosen) > 1


def test_the_picture_is_what_the_network_reads(comparer, trained):
  model = trained.model
  found = comparer.compare(pictures(1, side=50)[0])
  for option in found.options:
    size_px = option.prediction.size_px
    assert option.view.shape == (size_px, size_px, 3)
    norm = model.norm_set(size_px)
    logits = model.base.apply(
      {
        'params': resolution_norm.merge(
          trained.params['base'], trained.params['norm'][norm]
        ),
        'batch_stats': trained.batch_stats['norm'][norm],
      },
      (option.view[None] / 255.0 - 0.5) / 0.25,
      train=False,
    )
    # Half a grey level is lost to rounding.
    np.testing.assert_allclose(
      jax.nn.softmax(logits)[0], option.prediction.probabilities, atol=5e-3
    )


def test_a_budget_does_not_leak_into_another_answer(comparer, classifier):
  low, high = comparer.budgets
  images = list(pictures(8, seed=6))
  asked = [{'gmacs': low}, {'gmacs': high}, {'option': '24 px'}, {}] * 6
  jobs = [(images[i % 8], options) for i, options in enumerate(asked)]
  expected = [comparer.compare(x, **options).answer for x, options in jobs]
  assert len({x.size_px for x in expected}) == 3
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    futures = [
      threads.submit(comparer.compare, x, **options) for x, options in jobs
    ]
    found = [future.result().answer for future in futures]
  assert [x.size_px for x in found] == [x.size_px for x in expected]
  assert [x.gmacs for x in found] == [x.gmacs for x in expected]


def test_what_a_budget_promises(comparer):
  low, high = comparer.budgets
  middle = (low + high) / 2
  assert comparer.promise(middle).gmacs == pytest.approx(middle)
  assert low <= comparer.usual_gmacs <= high
  with pytest.raises(UserError, match='out of reach'):
    comparer.compare(pictures(1)[0], gmacs=2 * high)


def test_exits(trained_exits):  # noqa: F811
  gmacs = trained_exits.model.macs().gmacs
  rng = np.random.default_rng(0)
  calibration = ExitCalibration(
    rng.uniform(0, 1, (100, len(gmacs))),
    np.ones((100, len(gmacs)), bool),
    Costs('GMACs', gmacs, 0.0, ''),
    None,
    'a test',
  )
  comparer = Comparer(trained_exits, calibration=calibration)
  assert page.Answers(comparer).ways == [BUDGET, *comparer.options]
  image = small_pictures(1, seed=1)[0]
  first = comparer.compare(image, gmacs=gmacs[0])
  last = comparer.compare(image, gmacs=gmacs[-1])
  assert [x.answer.option for x in (first, last)] == ['exit 1', 'exit 4']
  assert first.answer.top == first.options[0].prediction.top
  assert first.answer.gmacs == pytest.approx(gmacs[0])
  assert first.full.prediction.gmacs == pytest.approx(gmacs[-1])
  comparer.calibration = None
  answers = page.Answers(comparer)
  assert answers.ways == list(comparer.options) and comparer.budgets is None
  assert answers.first_way == 'exit 4'
  assert comparer.compare(image).answer.option == 'exit 4'


def test_the_page_answers_in_words(comparer, tmp_path):
  answers = page.Answers(comparer)
  assert answers.ways == [OWN, BUDGET, '16 px', '24 px', '32 px']
  good, bad = str(tmp_path / '<i>.png'), str(tmp_path / 'bad.png')
  Image.fromarray(pictures(1)[0]).save(good)
  (tmp_path / 'bad.png').write_bytes(b'no image')
  (*_, (html, promise)) = answers.show([good, bad], '24 px', 0.0)
  assert 'data-option="24 px"' in html and '&lt;i&gt;.png' in html
  assert '<i>' not in html and promise == ''
  assert html.count('role="alert"') == 1 and str(tmp_path) not in html
  assert 'cannot read bad.png as an image' in html
  (found,) = answers.show([good], BUDGET, comparer.budgets[0])
  assert '16 px 100 %' in found[1] and 'data-option="16 px"' in found[0]
  (*_, (html, _)) = answers.show([bad] * 25, OWN, 0.0)
  assert html.count('cannot read') == 24 and 'first 24 of 25' in html
  assert answers.show([], OWN, 0.0).__next__()[0].startswith('<p>Drop')


def test_a_model_without_a_router_has_fixed_sizes_only():
  comparer = Comparer(tiny_trained(has_router=False))
  answers = page.Answers(comparer)
  assert answers.ways == ['16 px', '24 px', '32 px']
  assert answers.first_way == '32 px' and comparer.budgets is None


def test_amounts():
  assert cards.amount(0.00396) == '3.96 MMACs'
  assert cards.amount(4.089) == '4.09 GMACs'


def test_without_gradio(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  with pytest.raises(UserError, match=re.escape("'drnet_jax[demo]'")):
    page.import_gradio()


def test_the_true_reason_of_a_failed_import(monkeypatch, tmp_path):
  (tmp_path / 'gradio.py').write_text("raise RuntimeError('no\\nsuch thing')")
  monkeypatch.delitem(sys.modules, 'gradio', raising=False)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match='imported: RuntimeError: no such thing'):
    page.import_gradio()
  (tmp_path / 'gradio.py').write_text('import no_such_part')
  with pytest.raises(UserError, match="No module named 'no_such_part'"):
    page.import_gradio()


_BEHIND_A_PROXY = """
import socket, urllib.request
from drnet_jax.demo import page
gradio = page.import_gradio()
with gradio.Blocks(analytics_enabled=False) as blocks:
  gradio.Markdown('here I am')
with socket.socket() as free:
  free.bind(('127.0.0.1', 0))
  port = free.getsockname()[1]
blocks.block_thread = lambda: None
page.serve(blocks, '127.0.0.1', port)
print(b'here I am' in urllib.request.urlopen(blocks.local_url).read())
"""


@pytest.mark.slow
def test_the_page_is_served_behind_any_proxy():
  nowhere = {'http': 'http', 'https': 'http', 'all': 'socks5'}
  environment = {
    name: f'{scheme}://127.0.0.1:9'
    for kind, scheme in nowhere.items()
    for name in (f'{kind}_proxy', f'{kind}_PROXY'.upper())
  }
  done = subprocess.run(
    [sys.executable, '-c', _BEHIND_A_PROXY],
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )
  assert done.stdout.strip() == 'True', done.stderr
