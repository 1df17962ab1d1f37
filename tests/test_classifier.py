# SPDX-License-Identifier: Apache-2.0
"""Classifying: the right answers in the right order, whatever is handed in."""

import dataclasses
import importlib.util
import io
import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest
from conftest import (
  compilations,
  encoded,
  pictures,
  recorded,
  tiny_trained,
)
from PIL import Image
from test_pixels import header_of_a_png

from drnet_jax.choosing import policy, record
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.data import pixels, transforms
from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.export.programs import programs
from drnet_jax.serve.answers import Failure, predictions
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.engines import LadderEngine
from drnet_jax.serve.picture import Picture
from drnet_jax.serve.schedule import Item
from drnet_jax.serve.streaming import Request
from drnet_jax.serve.xla import XlaEngine

KEPT = 'jax, images kept on the device'  # as on every device but a CPU
RUNTIMES = (
  'jax',
  KEPT,
  'onnx',
  pytest.param(
    'openvino',
    marks=pytest.mark.skipif(
      importlib.util.find_spec('openvino') is None,
      reason='OpenVINO is not installed',
    ),
  ),
)


def kept(trained):
  contract = Contract.of(trained)
  made = programs(trained, contract)
  return XlaEngine('jax', made, contract, batches=[1, 4], keep=True)


@pytest.fixture(scope='module', params=RUNTIMES)
def classifier(request, trained):
  if request.param == KEPT:
    return Classifier(Contract.of(trained), kept(trained))
  # By 'auto' OpenVINO may take bfloat16 where the processor has it.
  return Classifier.of(trained, runtime=request.param, precision='f32', batch=4)


@pytest.fixture(autouse=True)
def policy_as_trained(request):
  yield
  if 'classifier' in request.fixturenames:
    shared = request.getfixturevalue('classifier')
    shared.policy = shared.contract.as_trained


def test_many_are_answered_in_order_at_their_own_size(classifier, trained):
  images = pictures(150)
  said = recorded(trained, images)  # every size on every image
  choice = said.choice
  probabilities = said.probabilities[np.arange(150), choice]
  assert len(set(choice.tolist())) == 3, 'the test should use every size'
  answers = classifier.predict(list(images))
  sizes, contract = trained.model.resolutions, classifier.contract
  assert [x.size_px for x in answers] == [sizes[j] for j in choice]
  np.testing.assert_allclose(
    [x.probabilities for x in answers], probabilities, atol=1e-5
  )
  assert [x.label for x in answers] == probabilities.argmax(1).tolist()
  for x, j in zip(answers, choice, strict=True):
    assert x.gmacs == pytest.approx(
      contract.gmacs[j] + contract.predictor_gmacs
    )
    assert x.name == 'abcde'[x.label] == x.top[0][0]
    assert [p for _, p in x.top] == sorted(x.probabilities, reverse=True)[:5]


def test_one_by_one_and_generated_are_the_same(classifier):
  images = pictures(20, seed=1)
  together = classifier.predict(x for x in images)
  for image, expected in zip(images, together, strict=True):
    (single,) = classifier.predict([image], top_k=2)
    assert single.size_px == expected.size_px and len(single.top) == 2
    np.testing.assert_allclose(
      single.probabilities, expected.probabilities, atol=1e-6
    )
  assert classifier.predict([]) == []


def test_kept_on_the_device_an_image_is_sent_there_once(trained, monkeypatch):
  classifier = Classifier(Contract.of(trained), kept(trained))
  sent, put = [], classifier.engine.put

  def note(crops):
    sent.append(len(crops))
    return put(crops)

  monkeypatch.setattr(classifier.engine, 'put', note)
  every = tuple(range(len(classifier.contract.options)))
  for asked in (
    classifier.contract.as_trained,
    policy.Policy(every, None, (1.0,) * (len(every) - 1)),
  ):
    sent.clear()
    classifier.policy = asked
    assert len(classifier.predict(pictures(50))) == sum(sent) == 50


def test_networks_of_a_ladder_are_sent_crops_of_their_own(trained):
  """Even if both keep images on the device: one's are nothing to the other."""
  contracts = {'one': Contract.of(trained), 'two': Contract.of(trained)}
  engine = LadderEngine([(kept(trained), c) for c in contracts.values()])
  both = Classifier(Contract.join(contracts), engine)
  assert kept(trained).pool(2) and not any(engine.pool(j) for j in range(6))
  alone, images = Classifier(contracts['one'], kept(trained)), pictures(30)
  alone.policy = policy.fixed(2)
  # Of the first network the smallest size, then of the second the largest.
  both.policy = policy.Policy((0, 5), None, (2.0,), answer='last')
  for a, b in zip(alone.predict(images), both.predict(images), strict=True):
    np.testing.assert_array_equal(a.probabilities, b.probabilities)
    assert len(b.ran) == 2


def test_twice_the_same_is_bit_for_bit_the_same(classifier):
  images = pictures(50, seed=2)
  first, second = classifier.predict(images), classifier.predict(images)
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a.probabilities, b.probabilities)


def test_of_equal_classes_the_first_wins(trained):
  contract = Contract.of(trained)
  names, rng = contract.class_names, np.random.default_rng(0)
  item = Item(0, None, policy.fixed(0), tried=[0])
  for _ in range(100):
    p = rng.integers(0, 4, len(names)).astype(np.float32)
    order = sorted(range(len(names)), key=lambda i: (-p[i], i))
    for top_k in (0, 1, 3, len(names), len(names) + 1):
      (found,) = predictions(contract, [item], p[None], top_k)
      assert found.label == order[0]
      assert [x for x, _ in found.top] == [names[i] for i in order[:top_k]]


def test_paths_bytes_pil_and_arrays_are_the_same(classifier, tmp_path):
  image = pictures(1, side=40)[0]
  path = tmp_path / 'image.png'
  path.write_bytes(encoded(image))
  grey = image[..., :1]
  kinds = [
    str(path),
    path,
    encoded(image),
    bytearray(encoded(image)),
    Image.fromarray(image),
    image,
    image.astype(np.int64),
    image.astype(np.float32) / 255,
    image.astype(np.uint16) * 257,
    jax.numpy.asarray(image),
    np.dstack([image, np.full_like(grey, 255)]),
  ]
  answers = classifier.predict(kinds)
  for x in answers:
    np.testing.assert_array_equal(x.probabilities, answers[0].probabilities)


@pytest.mark.parametrize(
  'array, message',
  [
    (np.zeros((3, 32, 32), np.uint8), r'shape \[3, 32, 32\] is no image'),
    (np.zeros((0, 32, 3), np.uint8), 'is no image'),
    (np.full((8, 8, 3), 255.0), 'within 0 and 1, these are from 255.0'),
    (np.full((8, 8, 3), np.nan), 'within 0 and 1'),
    (np.full((8, 8), 300), 'within 0 and 255'),
    (np.full((8, 8), -1), 'within 0 and 255'),
    (np.full((8, 8), 'x'), 'is no image'),
  ],
)
def test_arrays_that_would_need_a_guess_are_refused(array, message):
  with pytest.raises(UserError, match=message):
    pixels.decode(array)


def test_a_fixed_size_needs_no_predictor(classifier, trained):
  classifier.set_size(24)
  images = pictures(9)
  answers = classifier.predict(images)
  assert {x.size_px for x in answers} == {24}
  assert answers[0].gmacs == classifier.contract.gmacs[1]
  expected = jax.nn.softmax(
    trained.model.logits_at(trained.params, trained.batch_stats, images, 24)
  )
  np.testing.assert_allclose(
    [x.probabilities for x in answers], expected, atol=1e-5
  )
  with pytest.raises(UserError, match="'25 px' is not one of"):
    classifier.set_size(25)


def test_without_a_trained_predictor_the_largest_size_runs():
  unrouted = tiny_trained(has_router=False)
  classifier = Classifier.of(unrouted, runtime='jax', batch=2)
  answers = classifier.predict(pictures(3))
  assert {x.size_px for x in answers} == {32}
  assert answers[0].gmacs == answers[0].full_gmacs
  with pytest.raises(UserError, match='not calibrated'):
    classifier.set_budget(gmacs=1.0)


@pytest.fixture(scope='module')
def seen(trained):
  """What is said of a thousand images, and what the best policies are."""
  images = pictures(1000, seed=3)
  # Labels that the larger sizes name more often than the smaller ones.
  said = recorded(trained, images)
  rng = np.random.default_rng(0)
  kept = rng.random((1000, 3)) < [0.5, 0.7, 0.9]
  labels = np.where(
    kept.any(1),
    said.predicted[np.arange(1000), kept.argmax(1)],
    rng.integers(0, 5, 1000),
  )
  made = recorded(trained, images, labels)
  return images, made, Calibration.of(made, split='a test')


def points_of(calibration, family):
  """A cheap, a middling and an expensive setting."""
  points = calibration.points['GMACs'][family]
  return [points[i].policy for i in {0, len(points) // 2, len(points) - 1}]


@pytest.mark.parametrize('family', policy.FAMILIES)
def test_a_policy_does_for_real_what_its_record_says(classifier, seen, family):
  images, made, calibration = seen
  for chosen in points_of(calibration, family):
    classifier.policy = chosen
    answers = classifier.predict(images)
    agrees(answers, chosen, made)
    for i in range(0, 1000, 200):
      (alone,) = classifier.predict([images[i]])
      assert alone.ran == answers[i].ran
    with classifier.stream(deadline_ms=1e5, batch=4) as stream:
      futures = [stream.submit(image) for image in images[:300]]
    assert [f.result().ran for f in futures] == [x.ran for x in answers[:300]]
    assert stream.hurried == stream.late == 0


def agrees(answers, chosen, made):
  """Options, answers and costs are those of the record; ties apart."""
  decided = policy.decide(chosen, made, made.costs)
  names = made.options.names
  rows = zip(
    decided.first, decided.last, decided.column, decided.cost, strict=True
  )
  others = 0
  for i, (answer, (first, last, column, cost)) in enumerate(
    zip(answers, rows, strict=True)
  ):
    path = chosen.path[first : last + 1]
    if answer.ran != tuple(names[j] for j in path):
      others += 1
      continue
    assert answer.label == made.predicted[i, column]
    assert answer.gmacs == pytest.approx(cost)
    assert answer.probability == pytest.approx(
      made.confidence[i, column], abs=1e-5
    )
  assert others <= 1, 'an image may lie at a threshold to the last digit'


@pytest.mark.parametrize('answer', ('last', 'pooled'))
@pytest.mark.parametrize('signal', ('margin', 'probability'))
def test_every_kind_of_cascade_is_what_its_record_says(
  classifier, seen, answer, signal
):
  images, made, _ = seen
  limits = np.quantile(made.signal(signal)[:, :3], 0.6, axis=0)
  chosen = policy.Policy((0, 2), None, (limits[0].item(),), answer, signal)
  classifier.policy = chosen
  answers = classifier.predict(images[:300])
  agrees(answers, chosen, made.some(slice(300)))
  assert {len(x.ran) for x in answers} == {1, 2}


def test_a_budget_is_kept_to(classifier, seen):
  with pytest.raises(UserError, match='not calibrated'):
    classifier.set_budget(gmacs=1.0)
  images, made, classifier.calibration = seen
  full = classifier.contract.costs.full
  try:
    for share in (0.4, 0.7, 1.1):
      promised = classifier.set_budget(gmacs=share * full)
      spent = np.mean([x.gmacs for x in classifier.predict(images)])
      assert spent == pytest.approx(promised.gmacs, rel=1e-3)
      assert spent <= share * full * 1.001
    routed = classifier.set_budget(policy='router', gmacs=0.7 * full)
    assert routed.policy.family == 'router'
  finally:
    classifier.calibration = None


def test_a_calibration_of_another_model_is_refused(trained, seen):
  small = tiny_trained(resolutions=(16, 32))
  other = Classifier.of(small, runtime='jax', batch=1)
  with pytest.raises(UserError, match='calibrate again'):
    Classifier(other.contract, other.engine, seen[2])


def test_a_calibrated_model_follows_its_best_policy(trained, seen):
  classifier = Classifier.of(
    trained, runtime='jax', batch=1, calibration=seen[2]
  )
  assert classifier.policy == seen[2].find().policy


# Ladders.


@pytest.fixture(scope='module')
def ladder(trained):
  """A small network at two sizes, then the one with a router."""
  small = tiny_trained(has_router=False, resolutions=(16, 32), spread=2.0)
  members = {'small': small, 'large': trained}
  return members, Classifier.of_ladder(members, runtime='jax', batch=4)


def test_a_ladder_is_what_its_record_says(ladder):
  members, classifier = ladder
  images = pictures(300, seed=8)
  labels = np.random.default_rng(0).integers(0, 5, 300)
  joined = record.join(
    {k: recorded(t, images, labels) for k, t in members.items()}
  )
  assert classifier.contract.options == joined.options
  assert classifier.contract.gmacs == pytest.approx(joined.costs.options)
  found = Calibration.of(joined, split='a test')
  for family in ('cascade', 'router', 'best'):
    for chosen in points_of(found, family):
      classifier.policy = chosen
      agrees(classifier.predict(images), chosen, joined)
  sure = joined.margin[:, 0]
  chosen = policy.Policy((0, 4), None, (float(np.median(sure)),), 'pooled')
  classifier.policy = chosen
  answers = classifier.predict(images)
  agrees(answers, chosen, joined)
  assert {x.option for x in answers} == {'small: 16 px', 'large: 32 px'}


def test_networks_of_a_ladder_know_the_same_classes(trained):
  other = dataclasses.replace(
    tiny_trained(has_router=False), class_names=tuple('abcdx')
  )
  with pytest.raises(UserError, match="'e' is now 'x'"):
    Classifier.of_ladder({'one': trained, 'two': other}, runtime='jax')


@pytest.mark.parametrize('keep', [False, True])
def test_nothing_is_compiled_after_loading(trained, keep):
  classifier = Classifier.of(trained, runtime='jax', batch=4)
  if keep:
    classifier.engine = kept(trained)
  with compilations() as compiled:
    for count in (1, 2, 7, 40):
      classifier.predict(pictures(count))
    with classifier.stream(deadline_ms=1) as stream:
      [stream.submit(image) for image in pictures(5)]
  assert not compiled


def test_broken_weights_are_told(trained):
  broken = jax.tree.map(lambda x: x * np.nan, trained.params['base'])
  params = trained.params | {'base': broken}
  bad = dataclasses.replace(trained, params=params)
  with pytest.raises(UserError, match='weights hold NaN'):
    Classifier.of(bad, runtime='jax', batch=1)


# Files that nobody would wish for.


def test_bad_files_among_a_thousand(trained, tmp_path):
  rng = np.random.default_rng(0)
  photo = pictures(1, side=48)[0]
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  turned = encoded(photo, 'JPEG', exif=exif)
  frames = [Image.fromarray(x) for x in pictures(3, side=40)]
  jpeg = encoded(photo, 'JPEG')
  good = {
    'turned.jpg': turned,
    'cmyk.jpg': encoded(Image.fromarray(photo).convert('CMYK'), 'JPEG'),
    'animated.gif': encoded(
      frames[0], 'GIF', save_all=True, append_images=frames[1:]
    ),
    'text_named.txt': jpeg,
    'tiny.png': encoded(photo[:1, :1]),
    'grey.png': encoded(photo[..., 0]),
    'wide.png': encoded(np.tile(photo[:4], (1, 40, 1))),
  }
  bad = {
    'empty.jpg': b'',
    'text.jpg': b'This is no picture.\n' * 50,
    'cut.jpg': jpeg[: len(jpeg) // 2],
    'cut.png': encoded(rng.integers(0, 256, (64, 64, 3), np.uint8))[:4000],
    'bomb.png': header_of_a_png(20_000, 20_000),
    'rubbish.jpg': rng.bytes(3000),
  }
  for name, data in (good | bad).items():
    (tmp_path / name).write_bytes(data)
  plain = [encoded(x) for x in pictures(100)]
  sources = [plain[i % 100] for i in range(1000)]
  places = rng.permutation(1000)[: len(good) + len(bad) + 1].tolist()
  names = [*good, *bad, 'missing.jpg']
  for place, name in zip(places, names, strict=True):
    sources[place] = str(tmp_path / name)
  expected = {
    place: name
    for place, name in zip(places, names, strict=True)
    if name not in good
  }

  classifier = Classifier.of(trained, runtime='onnx', batch=16)
  answers = classifier.predict(sources, on_error='return')
  failed = {
    i: x.source for i, x in enumerate(answers) if isinstance(x, Failure)
  }
  assert failed == {i: str(tmp_path / name) for i, name in expected.items()}
  reasons = {name: answers[place].reason for place, name in expected.items()}
  for name, reason in reasons.items():
    assert name in reason and '0x' not in reason
  assert '400000000 pixels' in reasons['bomb.png']
  assert 'no known format' in reasons['text.jpg']
  assert 'truncated' in reasons['cut.jpg'].lower()
  # The good among them are what they would be by themselves.
  for place in [*places[:3], 500]:
    (alone,) = classifier.predict([sources[place]])
    assert answers[place].size_px == alone.size_px
  upright = np.asarray(Image.open(io.BytesIO(turned)))
  (straight,) = classifier.predict([np.rot90(upright, -1)])
  np.testing.assert_allclose(
    answers[places[0]].probabilities, straight.probabilities, atol=1e-6
  )
  with pytest.raises(UserError, match='missing.jpg'):
    classifier.predict(sources)


# Decoding no more than is needed.


def smooth_jpeg(side):
  """A JPEG without detail that shrinking could lose."""
  x = np.linspace(0, 255, side)
  image = np.stack(
    [
      np.add.outer(x, x) / 2,
      np.add.outer(255 - x, x) / 2,
      np.tile(x, (side, 1)),
    ],
    -1,
  )
  return encoded(image.astype(np.uint8), 'JPEG', quality=95)


def test_scaled_decoding_shows_the_same_picture_at_every_size(trained):
  data = smooth_jpeg(300)
  contract = Contract.of(trained, decode='scaled')
  views = [
    dataclasses.replace(v, short_px=v.side_px + 4) for v in contract.views
  ]
  picture = Picture(data, contract)
  for view in views:
    whole = transforms.center_crop(
      pixels.decode(data),
      view.side_px,
      resize_px=view.short_px,
      keep_aspect=True,
    )
    crop = picture.crop(view)
    assert crop.shape == (view.side_px, view.side_px, 3)
    assert np.abs(crop.astype(int) - whole).mean() < 3
    # What was cut before does not show.
    np.testing.assert_array_equal(crop, Picture(data, contract).crop(view))


@pytest.mark.parametrize('kind', ['array', 'PIL', 'wide array'])
def test_a_picture_is_cut_once_and_keeps_little(trained, kind):
  """Whoever reuses the memory of an image does not change its crops."""
  contract = Contract.of(trained)
  view = contract.views[-1]
  shape = (view.short_px, view.short_px * (5 if kind == 'wide array' else 1), 3)
  painted = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  source = Image.fromarray(painted) if kind == 'PIL' else painted
  picture = Picture(source, contract)
  crop = picture.crop(view)
  before = crop.copy()
  if kind == 'PIL':
    source.paste((0, 0, 0), (0, 0, *source.size))
  else:
    source[:] = 0
  assert before.any()
  np.testing.assert_array_equal(picture.crop(view), before)
  kept = crop if crop.base is None else crop.base
  assert kept.nbytes <= 2 * crop.nbytes


def test_scaled_decoding_reads_no_larger_than_needed(trained, monkeypatch):
  decoded = []
  decode = pixels.decode

  def note(*arguments, **options):
    image = decode(*arguments, **options)
    decoded.append(image.shape[0])
    return image

  monkeypatch.setattr(pixels, 'decode', note)
  contract = Contract.of(trained, decode='scaled')
  for side, expected in ((256, 64), (255, 128), (140, 70), (70, 70)):
    picture = Picture(smooth_jpeg(side), contract)
    picture.cut(contract.views)
    for view in contract.views:
      picture.crop(view)
    assert decoded.pop() == expected and not decoded, 'once, at 64 px or more'


def test_scaled_decoding_changes_probabilities_little(trained):
  images = [smooth_jpeg(side) for side in (33, 64, 100, 257)] * 5
  full = Classifier.of(trained, runtime='onnx')
  scaled = Classifier.of(trained, runtime='onnx', decode='scaled')
  same = 0
  for a, b in zip(full.predict(images), scaled.predict(images), strict=True):
    if a.size_px == b.size_px:
      same += 1
      np.testing.assert_allclose(a.probabilities, b.probabilities, atol=0.05)
  assert same > 10


# Streams.


def test_a_stream_says_what_a_call_says(classifier):
  images = pictures(60, seed=4)
  expected = classifier.predict(images)
  with classifier.stream(deadline_ms=20, batch=4) as stream:
    futures = [stream.submit(image) for image in images]
    broken = stream.submit(b'no image')
  for future, alone in zip(futures, expected, strict=True):
    answer = future.result(timeout=10)
    assert answer.ran == alone.ran and not answer.hurried
    np.testing.assert_allclose(
      answer.probabilities, alone.probabilities, atol=1e-5
    )
  with pytest.raises(UserError, match='no known format'):
    broken.result(timeout=10)
  assert stream.answered == 60
  p50, p99 = stream.latency_ms((50, 99))
  assert 0 < p50 <= p99


def test_a_stream_takes_what_suits_the_engine(classifier):
  with classifier.stream(deadline_ms=20, batch=0) as stream:
    futures = [stream.submit(image) for image in pictures(9, seed=6)]
  assert all(future.result(timeout=10).name in 'abcde' for future in futures)


def test_only_new_images_wait_for_others(classifier):
  """A wait later on would make a place look slow, and hurry what follows."""
  classifier.policy = policy.Policy((0, 2), None, (0.5,))
  stream = classifier.stream(deadline_ms=1000, batch=4)
  item = Item(Request(5.0, Future()), None)
  reading = Item(None, None)
  for place, tried, start in ((0, [], 5.5), (1, [], 5.5), (1, [0], 5.0)):
    item.tried = tried
    waiting = stream._schedule.queues[place].waiting
    waiting.append(item)
    stream._unread.add(reading)
    assert stream._next() == (start, place)
    stream._unread.clear()
    assert stream._next() == (5.0, place)
    waiting.clear()


def test_a_stream_warms_up_what_it_will_run(classifier, monkeypatch):
  seen, run = set(), classifier.engine.run

  def note(option, inputs):
    seen.add((option, classifier.engine.bucket(option, len(inputs))))
    return run(option, inputs)

  monkeypatch.setattr(classifier.engine, 'run', note)
  classifier.policy = policy.Policy((0, 2), None, (0.5,))
  with classifier.stream(deadline_ms=100, batch=4):
    warm = seen.copy()
  assert warm == {
    (j, classifier.engine.bucket(j, n)) for j in (0, 2) for n in range(1, 5)
  }


def test_images_are_several(classifier, tmp_path):
  for one in ('photo.jpg', b'bytes', tmp_path / 'photo.jpg'):
    with pytest.raises(UserError, match=r'\[image\] for one'):
      classifier.predict(one)
  (answer,) = classifier.predict(pictures(1), top_k=0)
  assert answer.top == () and answer.name in 'abcde'


def test_a_cancelled_image_leaves_its_neighbours_alone(classifier):
  images = pictures(12, seed=5)
  with classifier.stream(deadline_ms=500, batch=4) as stream:
    futures = [stream.submit(image) for image in images]
    cancelled = [future.cancel() for future in futures[1::3]]
  for i, future in enumerate(futures):
    if i % 3 == 1 and cancelled[i // 3]:
      assert future.cancelled()
    else:
      assert future.result(timeout=10).name in 'abcde'


def test_a_stream_that_has_ended_takes_no_images(classifier):
  with classifier.stream(deadline_ms=20, batch=4) as stream:
    pass
  with pytest.raises(RuntimeError, match='after shutdown'):
    stream.submit(pictures(1)[0])
  assert not stream._open and not stream._unread


def test_what_fails_in_a_batch_fails_its_images_alone(classifier, monkeypatch):
  run = classifier.engine.run

  def fails_once(option, inputs):
    monkeypatch.setattr(classifier.engine, 'run', run)
    raise RuntimeError('a device is lost')

  classifier.set_size(16)
  with classifier.stream(deadline_ms=20, batch=2) as stream:
    monkeypatch.setattr(classifier.engine, 'run', fails_once)
    futures = [stream.submit(image) for image in pictures(6)]
  failed = [f for f in futures if f.exception()]
  assert 1 <= len(failed) <= 2
  assert all(f.result().size_px == 16 for f in futures if f not in failed)


@pytest.fixture
def slow_in_full(classifier, monkeypatch):
  """All go on to 32 px, where a batch takes as long as the list's item says."""
  run, seconds = classifier.engine.run, [0.0]

  def slowly(option, inputs):
    if classifier.contract.options.names[option] == '32 px':
      time.sleep(seconds[0])
    return run(option, inputs)

  monkeypatch.setattr(classifier.engine, 'run', slowly)
  classifier.policy = policy.Policy((0, 2), None, (np.inf,))
  return seconds


def test_under_too_much_load_images_leave_with_what_is_known(
  classifier, slow_in_full
):
  images = pictures(60, seed=2)
  classifier.set_size(16)
  small = classifier.predict(images)
  classifier.policy = policy.Policy((0, 2), None, (np.inf,))
  slow_in_full[0] = 0.2  # of 4 images: 20 a second, and 200 come
  with classifier.stream(deadline_ms=1000, batch=4) as stream:
    futures = []
    for image in images:
      futures.append(stream.submit(image))
      time.sleep(0.005)
  answers = [future.result() for future in futures]
  hurried = [x.hurried for x in answers]
  assert stream.hurried == sum(hurried) and 10 < stream.hurried < 60
  assert stream.late <= 4, stream.latency_ms((50, 100))  # of the first batch
  for answer, alone in zip(answers, small, strict=True):
    if answer.hurried:
      assert answer.ran == ('16 px',) and answer.label == alone.label
    else:
      assert answer.ran == ('16 px', '32 px')


def test_a_slow_batch_is_not_believed_for_ever(classifier, slow_in_full):
  with classifier.stream(deadline_ms=200, batch=4) as stream:
    slow_in_full[0] = 0.5
    late = stream.submit(pictures(1)[0]).result()
    slow_in_full[0] = 0.0
    answers = [stream.submit(image).result() for image in pictures(80)]
  assert not late.hurried and stream.late == 1
  assert answers[0].hurried and not answers[-1].hurried
