# SPDX-License-Identifier: Apache-2.0
"""What the demo page says is what the classifier says."""

import concurrent.futures
import copy
import dataclasses
import re
import sys

import jax
import numpy as np
import pytest
from conftest import pictures, tiny_exits, tiny_trained
from PIL import Image
from records import calibration_of

from drnet_jax.choosing.policy import fixed
from drnet_jax.demo import cards, page
from drnet_jax.demo.comparer import Comparer
from drnet_jax.demo.page import BUDGET, ROUTER
from drnet_jax.errors import UserError
from drnet_jax.models import resolution_norm
from drnet_jax.serve.classifier import Classifier


@pytest.fixture(scope='module')
def classifier(trained):
  calibration = calibration_of(trained, pictures(200))
  return Classifier.of(trained, runtime='jax', batch=1, calibration=calibration)


@pytest.fixture(scope='module')
def comparer(classifier):
  return Comparer(classifier)


def by(classifier, policy):
  """The same networks, that follow another policy."""
  other = Classifier(classifier.contract, classifier.engine)
  other.policy = policy
  return other


def test_numbers_are_those_of_the_classifier(comparer, classifier):
  contract = classifier.contract
  sizes = contract.sizes_px
  middle = sum(comparer.budgets) / 2
  for policy in (contract.as_trained, comparer.promise(middle).policy):
    ended = set()
    for image in pictures(12, seed=5):
      found = comparer.compare(image, policy)
      (expected,) = by(classifier, policy).predict([image])
      assert found.answer.ran == expected.ran
      assert found.answer.gmacs == expected.gmacs
      assert found.answer.top == expected.top
      assert found.last is found.options[sizes.index(expected.size_px)]
      ended.add(expected.size_px)
      for j, option in enumerate(found.options):
        (alone,) = by(classifier, fixed(j)).predict([image])
        assert option.prediction.top == alone.top
        assert option.prediction.gmacs == alone.gmacs == contract.gmacs[j]
        assert 0 < option.ms < 1000
      assert found.full.prediction.size_px == sizes[-1]
      assert found.ms > 0
    assert len(ended) > 1


@pytest.mark.parametrize('antialias', [True, False])
def test_the_picture_is_what_the_network_reads(antialias):
  trained = tiny_trained(antialias=antialias)
  model = trained.model
  classifier = Classifier.of(trained, runtime='jax', batch=1)
  assert classifier.contract.antialias == (antialias,) * 3
  found = Comparer(classifier).compare(pictures(1, side=50)[0], fixed(0))
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


def test_a_policy_does_not_leak_into_another_answer(comparer, classifier):
  before = classifier.policy
  low, high = (comparer.promise(gmacs).policy for gmacs in comparer.budgets)
  images = list(pictures(8, seed=6))
  policies = [low, high, comparer.option('24 px'), before] * 6
  jobs = [(images[i % 8], policy) for i, policy in enumerate(policies)]
  expected = [comparer.compare(*job).answer for job in jobs]
  assert len({x.size_px for x in expected}) == 3
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    futures = [threads.submit(comparer.compare, *job) for job in jobs]
    found = [future.result().answer for future in futures]
  assert [x.ran for x in found] == [x.ran for x in expected]
  assert [x.gmacs for x in found] == [x.gmacs for x in expected]
  assert classifier.policy == before


def test_what_a_budget_promises(comparer):
  low, high = comparer.budgets
  points = comparer.calibration.points['GMACs']['best']
  assert (low, high) == (points[0].gmacs, points[-1].gmacs)
  middle = (low + high) / 2
  within = [point for point in points if point.gmacs <= middle]
  assert comparer.promise(middle) == within[-1]
  with pytest.raises(UserError, match='out of reach'):
    comparer.promise(low / 2)


def test_exits():
  trained = tiny_exits()
  gmacs = trained.model.macs().gmacs
  images = pictures(100, side=16)
  calibration = calibration_of(trained, images)
  comparer = Comparer(
    Classifier.of(trained, runtime='jax', batch=1, calibration=calibration)
  )
  assert page.Answers(comparer).ways == [BUDGET, *comparer.options]
  low, high = (comparer.promise(x).policy for x in comparer.budgets)
  found = {}
  for image in pictures(12, side=16, seed=1):
    first, last = (comparer.compare(image, policy) for policy in (low, high))
    for x in (first, last):
      ended = comparer.options.index(x.answer.option)
      # An exit costs no more than all before it together.
      assert x.answer.gmacs == pytest.approx(gmacs[ended])
      assert x.answer.top == x.options[ended].prediction.top
      assert x.full.prediction.gmacs == pytest.approx(gmacs[-1])
      found.setdefault(x is first, []).append(ended)
  assert np.mean(found[True]) < np.mean(found[False])
  image = pictures(1, side=16)[0]
  answers = page.Answers(
    Comparer(Classifier.of(trained, runtime='jax', batch=1))
  )
  assert answers.ways == list(comparer.options)
  assert answers.comparer.budgets is None and answers.first_way == 'exit 4'
  answer = comparer.compare(image, comparer.option('exit 4')).answer
  # Nothing was tried before: the exits on the way were only passed.
  assert answer.option == 'exit 4' and answer.ran == ('exit 4',)


def test_the_page_answers_in_words(comparer, tmp_path):
  answers = page.Answers(comparer)
  assert answers.ways == [BUDGET, ROUTER, '16 px', '24 px', '32 px']
  assert answers.first_way == BUDGET
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
  assert 'Policy: fixed 16 px.' in found[1]
  (*_, (html, _)) = answers.show([bad] * 25, ROUTER, 0.0)
  assert html.count('cannot read') == 24 and 'first 24 of 25' in html
  assert answers.show([], ROUTER, 0.0).__next__()[0].startswith('<p>Drop')


def test_what_was_tried_before_is_said(comparer):
  every = comparer.calibration.find(policy='cascade', accuracy=1.0).policy
  for image in pictures(20, seed=7):
    found = comparer.compare(image, every)
    html = cards.card('x', found)
    before = ', '.join(found.answer.ran[:-1])
    assert (f'Tried before: {before}.' in html) == bool(before)
    assert len(re.findall('class="option[ "]', html)) == 3
    if before:
      break
  else:
    raise AssertionError('no image went on')


def test_the_page_opens_with_an_answer(comparer, tmp_path):
  pytest.importorskip('gradio')
  folder = tmp_path / 'run' / 'report' / 'examples'
  folder.mkdir(parents=True)
  for i in range(2):
    Image.fromarray(pictures(2)[i]).save(folder / f'{i}.png')
  blocks = page.build(comparer, str(tmp_path / 'run'))
  (load,) = [
    f for f in blocks.fns.values() if any(t[1] == 'load' for t in f.targets)
  ]
  values = [x.value for x in load.inputs]
  assert [path.endswith('0.png') for path in values[0]] == [True]
  assert values[1] == BUDGET
  (*_, (html, promise)) = load.fn(*values)
  assert '0.png' in html and html.count('class="card"') == 1
  assert promise.startswith('On a test this budget costs')


def test_the_slider_reaches_every_policy(comparer):
  gradio = pytest.importorskip('gradio')
  with gradio.Blocks():
    slider, unit = page._slider(gradio, comparer)
  calibration = comparer.calibration
  points = calibration.points['GMACs']['best']
  for at, point in (
    (slider.minimum, points[0]),
    (slider.value, calibration.find()),
    (slider.maximum, points[-1]),
  ):
    assert comparer.promise(page._within(at * unit, comparer)) == point


def test_one_policy_for_every_budget_needs_no_slider(comparer):
  best = comparer.calibration.points['GMACs']['best'][-1:]
  calibration = dataclasses.replace(
    comparer.calibration,
    points={'GMACs': comparer.calibration.points['GMACs'] | {'best': best}},
  )
  alone = copy.copy(comparer)
  alone.calibration = calibration
  assert alone.budgets is None
  slider, _ = page._slider(pytest.importorskip('gradio'), alone)
  assert not slider.interactive and 'One policy is the best' in slider.info


def test_a_model_without_a_router_has_fixed_sizes_only():
  model = tiny_trained(has_router=False)
  answers = page.Answers(Comparer(Classifier.of(model, runtime='jax', batch=1)))
  assert answers.ways == ['16 px', '24 px', '32 px']
  assert answers.first_way == '32 px' and answers.comparer.budgets is None


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
