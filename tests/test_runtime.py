# SPDX-License-Identifier: Apache-2.0
"""Which runtime is chosen, that it answers as JAX does, and what it needs."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import compilations, encoded, pictures, tiny_exits, tiny_trained

from drnet_jax import cache
from drnet_jax.choosing import policy
from drnet_jax.choosing.policy import Policy
from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.run.checkpoint import Checkpoints
from drnet_jax.serve import choice, openvino, openvino_graphs, parity
from drnet_jax.serve.choice import How
from drnet_jax.serve.classifier import Classifier

ROOT = pathlib.Path(__file__).parents[1]
needs_openvino = pytest.mark.skipif(
  importlib.util.find_spec('openvino') is None,
  reason='OpenVINO is not installed',
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  choice.machine.cache_clear()


@pytest.fixture(scope='module')
def ladder(trained):
  small = tiny_trained(has_router=False, resolutions=(16, 32), spread=2.0)
  return {'small': small, 'large': trained}


# What a processor can.


@pytest.mark.parametrize(
  'abilities, expected',
  [
    (['FP32', 'INT8', 'BIN', 'EXPORT_IMPORT'], ['f32']),  # AVX2
    (['FP32', 'INT8', 'BIN', 'BF16', 'EXPORT_IMPORT'], ['bf16', 'f32']),
    (['FP32', 'FP16', 'INT8', 'BF16'], ['bf16', 'f32']),  # AMX
    (['FP32', 'FP16', 'INT8'], ['f16', 'f32']),  # ARM
    ([], ['f32']),
  ],
)
def test_the_fastest_precision_of_a_processor_comes_first(abilities, expected):
  assert openvino.precisions(abilities) == expected


def test_precisions_are_candidates_as_the_processor_has_them(monkeypatch):
  monkeypatch.setattr(choice, 'is_installed', lambda module: True)
  monkeypatch.setattr(openvino, 'abilities', lambda: ['FP32', 'BF16'])
  in_halves, whole = ('openvino', 'bf16'), ('openvino', 'f32')
  assert choice.candidates(How()) == [('onnx', 'f32'), in_halves, whole]
  assert choice.candidates(How('openvino')) == [in_halves, whole]
  assert choice.candidates(How('openvino', 'f32')) == [whole]
  assert choice.candidates(How('auto', 'f32')) == [('onnx', 'f32'), whole]
  assert choice.candidates(How('auto', 'bf16')) == [in_halves]
  assert choice.candidates(How('onnx')) == [('onnx', 'f32')]


def test_openvino_that_cannot_be_imported_is_one_candidate_less(monkeypatch):
  def fails():
    raise UserError('libstdc++ is too old')

  monkeypatch.setattr(choice, 'is_installed', lambda module: True)
  monkeypatch.setattr(openvino, 'abilities', fails)
  # `choose` leaves out what cannot be made.
  assert choice.candidates(How()) == [('onnx', 'f32'), ('openvino', 'f32')]
  with pytest.raises(UserError, match='too old'):
    choice.candidates(How('openvino'))


@pytest.mark.parametrize(
  'how, message',
  [
    ({'precision': 'f64'}, "'f64' is not one of"),
    ({'runtime': 'jax', 'precision': 'bf16'}, "needs runtime='openvino'"),
    ({'runtime': 'tvm'}, "'tvm' is not one of"),
  ],
)
def test_what_cannot_be_asked_for(trained, how, message):
  with pytest.raises(UserError, match=message):
    Classifier.of(trained, **how)


@needs_openvino
def test_openvino_is_told_the_precision(trained):
  """Left alone it rounds to bfloat16 wherever the processor can."""
  has = [p for a, p in openvino._ABILITIES if a in openvino.abilities()]
  assert has[-1] == 'f32'
  engine = Classifier.of(trained, runtime='openvino').engine
  compiled = engine._networks[0].graph.compiled(1)
  told = compiled.get_property('INFERENCE_PRECISION_HINT')
  assert told.to_string() in ('f32', has[0])
  for precision in {'bf16', 'f16'} - {*has}:
    with pytest.raises(UserError, match=f'has {", ".join(has)} only'):
      Classifier.of(trained, runtime='openvino', precision=precision)


# Choosing.


class Imaginary:
  """Takes its time and says something."""

  best_batch, in_flight = 2, 1

  def __init__(self, seconds, off=0.0):
    self._seconds, self._off = seconds, off

  def log_p(self, images):
    return np.log(self.run(0, images)[0])

  def run(self, option, images):
    time.sleep(self._seconds)
    bright = images.mean((1, 2, 3)) / 255 * 0.9 + self._off
    return np.stack([bright, 1 - bright], 1), None


class Overflowing(Imaginary):
  """Half precision that does not last for the larger sizes."""

  def __init__(self):
    super().__init__(0.0)

  def run(self, option, images):
    said, state = super().run(option, images)
    return said * (np.nan if option else 1.0), state


def imagined(**engines):
  return {
    (name, 'bf16' if 'half' in name else 'f32'): (lambda e=e: e)
    for name, e in engines.items()
  }


def test_the_fastest_that_agrees_is_chosen_once(trained):
  contract = Classifier.of(trained, runtime='jax', batch=1).contract
  tried = imagined(
    jax=Imaginary(0.02),
    onnx=Imaginary(0.01),
    wrong=Imaginary(0.0, off=0.001),
    half=Imaginary(0.005, off=0.001),
    half_off=Imaginary(0.0, off=0.09),
  )
  tried['broken', 'f32'] = lambda: 1 // 0
  tried['large', 'f32'] = Overflowing
  assert choice.remembered('a model', How(), list(tried)) is None
  found = choice.choose('a model', How(), tried, contract)
  assert (found.runtime, found.precision) == ('half', 'bf16')
  assert 'wrong is left out: a probability is 0.001 off' in found.said
  assert 'half_off in bf16 is left out' in found.said and 'jax' in found.said
  assert 'broken is left out: integer division' in found.said
  assert 'large is left out: a probability is nan off' in found.said
  again = choice.remembered('a model', How(), list(tried))
  assert again == found
  # Another model, another way to ask, others to choose from: not that.
  assert choice.remembered('another', How(), list(tried)) is None
  assert choice.remembered('a model', How(batch=1), list(tried)) is None
  assert choice.remembered('a model', How(), list(tried)[1:]) is None
  for file in pathlib.Path(cache.path('choices')).iterdir():
    file.write_text('{"runtime": ')  # damaged
  assert choice.remembered('a model', How(), list(tried)) is None


def test_what_cannot_be_made_is_no_reference(trained):
  contract = Classifier.of(trained, runtime='jax', batch=1).contract
  tried = imagined(onnx=None, openvino=Imaginary(0.0))
  tried['onnx', 'f32'] = lambda: 1 // 0
  found = choice.choose('a model', How(), tried, contract)
  assert found.runtime == 'openvino' and 'onnx is left out' in found.said
  tried['openvino', 'f32'] = lambda: 1 // 0
  with pytest.raises(ZeroDivisionError):
    choice.choose('a model', How(), tried, contract)


def test_a_choice_without_the_device_at_hand_is_not_kept(trained, monkeypatch):
  """JAX runs on the processor where its accelerator is busy or hidden."""
  contract = Classifier.of(trained, runtime='jax', batch=1).contract
  tried = imagined(jax=Imaginary(0.0), onnx=Imaginary(0.001))
  monkeypatch.setattr(choice, '_devices', lambda: ['/dev/nvidia0'])
  monkeypatch.setattr(choice, 'is_installed', lambda module: 'cuda' in module)
  for name in choice._HIDE:
    monkeypatch.delenv(name, raising=False)
  for _ in range(2):
    choice.choose('a model', How(), tried, contract)
    assert choice.remembered('a model', How(), tried) is None
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')  # hides others alone
    choice.machine.cache_clear()
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  choice.machine.cache_clear()
  choice.choose('a model', How(), tried, contract)
  assert choice.remembered('a model', How(), tried).runtime == 'jax'
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
  choice.machine.cache_clear()
  assert choice.remembered('a model', How(), tried) is None


def test_half_precision_is_judged_by_the_pictures_on_average():
  """One picture on the edge decides nothing there; in float32 it does."""
  true = [np.full((16, 2), 0.5)]
  found = [true[0].copy()]
  found[0][3] += (0.2, -0.2)
  assert choice._apart('bf16', found, true) == pytest.approx(0.2 / 16)
  for precision in ('f32', 'int8'):
    assert choice._apart(precision, found, true) == pytest.approx(0.2)
  # The worst of several options counts, and NaN in any is far.
  both = true * 2, [true[0], true[0] + 0.04]
  assert choice._apart('bf16', *both) == pytest.approx(0.04)
  found[0][5] = np.nan
  assert np.isnan(choice._apart('bf16', found, true))


@pytest.mark.parametrize('batch', [0, 1])
def test_auto_agrees_and_is_measured_once(trained, batch, monkeypatch):
  # In half precision answers are the same to the second digit only, see below.
  how = {'batch': batch, 'precision': 'f32'}
  first = Classifier.of(trained, **how)
  assert first.engine.name in first.runtime and 'the fastest' in first.runtime
  monkeypatch.setattr(choice, 'choose', None)
  second = Classifier.of(trained, **how)
  assert second.runtime == first.runtime
  reference = Classifier.of(trained, runtime='jax', batch=4)
  assert parity.compare(reference, second, list(pictures(40))).holds


def test_without_anything_else_it_is_jax(trained, monkeypatch):
  monkeypatch.setattr(choice, 'is_installed', lambda module: False)
  assert Classifier.of(trained, batch=1).runtime == 'jax'
  assert not os.path.exists(cache.path('models'))


def test_an_exported_folder_is_run_in_what_there_is(
  trained, tmp_path, monkeypatch
):
  folder = str(tmp_path / 'out')
  Classifier.of(trained, runtime='jax', batch=1).export(
    folder, formats=('onnx', 'stablehlo')
  )
  monkeypatch.setattr(choice, 'is_installed', lambda module: False)
  assert Classifier.load(folder, batch=1).runtime == 'stablehlo'
  monkeypatch.setattr(
    choice, 'is_installed', lambda module: module == 'onnxruntime'
  )
  assert Classifier.load(folder, batch=1).runtime == 'onnx'


def test_exits_are_jax(ladder):
  exits = tiny_exits()
  members = {'exits': exits, 'sizes': ladder['large']}
  both = Classifier.of_ladder(members, batch=1)
  assert both.runtime.startswith('exits: jax; sizes: ')


def test_what_cannot_be_written_as_a_graph_is_jax(trained, monkeypatch):
  from drnet_jax.export import package

  def refuse(*arguments, **options):
    raise UserError('cannot export')

  monkeypatch.setattr(package, 'write_onnx', refuse)
  assert Classifier.of(trained, batch=1).runtime == 'jax'
  with pytest.raises(UserError, match='cannot export'):
    Classifier.of(trained, runtime='onnx')


# OpenVINO answers as JAX does.


def same(ours, theirs, images):
  """Every option and every kind of policy, in bulk, singly and in a stream."""
  options = len(ours.contract.options)
  every = tuple(range(options))
  policies = [policy.fixed(j) for j in every]
  policies.append(Policy(every, None, (0.4,) * (options - 1)))
  if ours.contract.routes:
    policies.append(ours.contract.as_trained)
  for chosen in policies:
    ours.policy = theirs.policy = chosen
    found = parity.compare(ours, theirs, images)
    assert found.holds and not found.ties, found
    expected = theirs.predict(images)
    singly = [theirs.predict([x])[0] for x in images[:10]]
    with theirs.stream(deadline_ms=1e5, batch=4) as stream:
      futures = [stream.submit(x) for x in images]
    streamed = [future.result() for future in futures]
    for answers in (singly, streamed):
      for a, b in zip(answers, expected, strict=False):
        assert a.ran == b.ran
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)


@needs_openvino
@pytest.mark.parametrize(
  'kind, decode',
  [
    ('drnet', 'full'),
    ('drnet', 'scaled'),
    ('fixed', 'full'),
    ('ladder', 'full'),
    ('exported', 'full'),
    ('shared', 'full'),
  ],
)
def test_openvino_answers_as_jax(ladder, kind, decode, tmp_path):
  images = list(pictures(40))
  how = {'decode': decode, 'batch': 8, 'precision': 'f32'}
  if kind == 'ladder':
    ours, theirs = (
      Classifier.of_ladder(ladder, runtime=runtime, **how)
      for runtime in ('jax', 'openvino')
    )
  else:
    trained = ladder['large']
    if kind == 'fixed':
      trained = tiny_trained(
        has_router=False, resolutions=(32,), resolution_aware_bn=False
      )
    ours = Classifier.of(trained, runtime='jax', **how)
    if kind in ('exported', 'shared'):
      weights = 'shared' if kind == 'shared' else 'folded'
      ours.export(str(tmp_path / 'out'), formats=('onnx',), weights=weights)
      out = str(tmp_path / 'out')
      theirs = Classifier.load(out, runtime='openvino', precision='f32')
    else:
      theirs = Classifier.of(trained, runtime='openvino', **how)
  assert 'openvino' in theirs.engine.name
  same(ours, theirs, images)


@needs_openvino
def test_half_precision_gives_the_same_answers(trained):
  """Within what `choose` lets pass; no image is answered by another option."""
  precision = openvino.precisions(openvino.abilities())[0]
  if precision == 'f32':
    pytest.skip('this processor computes in float32 alone')
  images = list(pictures(40))
  reference = Classifier.of(trained, runtime='jax', batch=8)
  halved = Classifier.of(trained, runtime='openvino', precision=precision)
  assert halved.engine.name == f'openvino in {precision}'
  found = parity.compare(reference, halved, images)
  assert not found.others
  assert 0 < found.largest <= choice.TOLERANCE[precision]


@needs_openvino
def test_rewritten_resizes_are_the_same(trained, tmp_path):
  """And all sizes but the largest, which is not resized, are rewritten."""
  Classifier.of(trained, runtime='jax', batch=1).export(
    str(tmp_path), formats=('onnx',)
  )
  read, images = openvino.core().read_model, pictures(8)
  how = {'PERFORMANCE_HINT': 'THROUGHPUT', 'INFERENCE_PRECISION_HINT': 'f32'}
  resized = []
  for size_px in Contract.of(trained).sizes_px:
    file = str(tmp_path / f'r{size_px}.onnx')
    plain, turned, blocks = models = [read(file) for _ in range(3)]
    openvino_graphs.resize_in_half(turned)
    openvino_graphs.resize_in_blocks(blocks)
    resized.append(openvino_graphs._resize(plain) is not None)
    assert not openvino_graphs._resize(turned)
    assert not openvino_graphs._resize(blocks)
    found = [
      openvino.core().compile_model(model, 'CPU', how)(images)[0]
      for model in models
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)
  assert resized == [True, True, False]


@needs_openvino
@pytest.mark.parametrize('size_px', [8, 64, 101, 112, 224])
def test_a_resize_in_blocks_is_the_same_with_fewer_multiplications(size_px):
  """Up and down, and where no blocks are alike."""
  from openvino import Model
  from openvino import opset13 as op

  shrink = np.asarray(jax.image.resize(np.eye(160), (size_px, 160), 'bilinear'))
  images = op.parameter([-1, 3, 160, 160], np.float32)
  rows = op.matmul(shrink[None, None], images, False, False)
  columns = op.matmul(rows, shrink.T[None, None].copy(), False, False)
  model = Model([op.relu(columns)], [images])
  x = np.random.default_rng(0).random((2, 3, 160, 160), np.float32)
  found = []
  for _ in range(2):
    compiled = openvino.core().compile_model(
      model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'}
    )
    multiplied = sum(
      np.prod(node.output(0).get_partial_shape().get_max_shape()[1:])
      * node.input(1).get_partial_shape().get_max_shape()[-2]
      for node in model.get_ordered_ops()
      if node.get_type_name() == 'MatMul'
    )
    found.append((compiled(x)[0], multiplied))
    openvino_graphs.resize_in_blocks(model)
    model.validate_nodes_and_infer_types()
  (before, dense), (after, of_blocks) = found
  np.testing.assert_allclose(after, before, atol=1e-5)
  if size_px in (8, 101):  # too small for blocks, and of a prime number
    assert of_blocks <= dense
  else:
    assert of_blocks < 0.5 * dense


@needs_openvino
def test_sizes_that_share_weights_are_one_graph(trained, tmp_path):
  """Folded, each has weights of its own; graphs that differ are left apart."""
  depthwise = {
    'network': 'mobilenet_v2',
    'stem': 8,
    'stages': ((1, 8, 1, 2), (2, 8, 1, 2)),
    'head': 16,
  }
  networks = {
    'folded': trained,
    'shared': trained,
    'depthwise': tiny_trained(base=depthwise, has_router=False),
  }
  made = {}
  for name, network in networks.items():
    folder = str(tmp_path / name)
    weights = 'folded' if name == 'folded' else 'shared'
    ours = Classifier.of(network, runtime='jax', batch=1)
    ours.export(folder, formats=('onnx',), weights=weights)
    engine = Classifier.load(folder, runtime='openvino').engine
    made[name] = {network.graph for network in engine._networks}
  assert [len(graphs) for graphs in made.values()] == [3, 1, 3]
  constants = [
    sum(
      node.data.nbytes
      for node in graph.model.get_ordered_ops()
      if node.get_type_name() == 'Constant'
    )
    for graph in (*made['shared'], *made['folded'])
  ]
  assert constants[0] <= min(constants[1:])
  apart = [
    openvino.core().read_model(str(tmp_path / name / 'r16.onnx'))
    for name in ('folded', 'shared')
  ]
  assert openvino_graphs.merged(apart) is None


@needs_openvino
@pytest.mark.parametrize('network', ['resnet18', 'resnet18d'])
def test_sizes_that_pad_otherwise_are_graphs_of_their_own(network, tmp_path):
  """With 'SAME' a stride's padding depends on whether the side is even."""
  base = {'network': network, 'width': 8, 'padding': 'same'}
  sizes = {'resolutions': (48, 64), 'image_px': 64}
  odd = tiny_trained(base=base, has_router=False, **sizes)
  folder = str(tmp_path)
  how = {'runtime': 'jax', 'batch': 1}
  ours = Classifier.of(odd, **how)
  ours.export(folder, formats=('onnx',), weights='shared')
  theirs = Classifier.load(folder, runtime='openvino', precision='f32')
  assert len({x.graph for x in theirs.engine._networks}) == 2
  images = list(pictures(6, side=64))
  for j in range(2):
    ours.policy = theirs.policy = policy.fixed(j)
    assert parity.compare(ours, theirs, images).holds


@needs_openvino
def test_openvino_makes_only_what_is_run(trained):
  engine = Classifier.of(trained, runtime='openvino', precision='f32').engine
  images = pictures(40)
  engine.run(1, images[:1])
  assert [[*x.graph._compiled] for x in engine._networks] == [[], [1], []]
  # More batches under way than there are cores, in any order of asking.
  said = [engine.run(2, images[i : i + 5])[0] for i in range(0, 40, 5)]
  whole = np.asarray(engine.run(2, images)[0])
  for i in reversed(range(8)):
    np.testing.assert_allclose(
      np.asarray(said[i]), whole[5 * i : 5 * i + 5], atol=1e-6
    )


@needs_openvino
def test_depthwise_maps_stay_in_the_cache():
  """A core has few images at once, and they answer as they do alone."""
  depthwise = {
    'network': 'mobilenet_v2',
    'stem': 8,
    'stages': ((1, 8, 1, 2), (2, 8, 1, 2)),
    'head': 16,
  }
  network = tiny_trained(base=depthwise, has_router=False)
  engine = Classifier.of(network, runtime='openvino', precision='f32').engine
  graph = engine._networks[0].graph
  assert graph.at_once == 8
  images = pictures(19)
  found = np.asarray(engine.run(0, images)[0])
  assert {*graph._compiled} == {8, -1}
  alone = [np.asarray(engine.run(0, x[None])[0])[0] for x in images]
  assert {*graph._compiled} == {8, -1, 1}
  np.testing.assert_allclose(found, alone, atol=1e-6)
  again = np.asarray(engine.run(0, images[:16])[0])
  np.testing.assert_array_equal(again, found[:16])


@needs_openvino
@pytest.mark.parametrize(
  ('side', 'precision', 'expected'),
  [(64, 'f32', 8), (112, 'f32', 4), (160, 'f32', 2), (640, 'f32', 2)]
  + [(160, 'bf16', 4)],
)
def test_how_many_images_a_core_has_at_once(side, precision, expected):
  """Depends on the first convolution's maps; None without depthwise ones."""
  from openvino import Model
  from openvino import opset13 as op

  same = {'strides': [1, 1], 'dilations': [1, 1]}
  pads = {'pads_begin': [0, 0], 'pads_end': [0, 0]}
  images = op.parameter([-1, 3, side, side], np.float32)
  filters = np.zeros((4, 3, 1, 1), np.float32)
  x = op.convolution(images, filters, **same, **pads)
  assert openvino_graphs.at_once(Model([x], [images]), precision) is None
  filters = np.zeros((4, 1, 1, 3, 3), np.float32)
  x = op.group_convolution(x, filters, **same, **pads)
  model = Model([x], [images])
  assert openvino_graphs.at_once(model, precision) == expected


# What is kept.


def test_a_run_is_read_once_and_its_changes_are_seen(run, tmp_path):
  import shutil

  path = str(tmp_path / 'run')
  shutil.copytree(run, path)
  first = Classifier.load(path, runtime='onnx')
  with compilations() as compiled:
    second = Classifier.load(path, runtime='onnx')
  assert not compiled and second.contract == first.contract
  images = list(pictures(20, side=64))

  def said(classifier):
    return np.stack([x.probabilities for x in classifier.predict(images)])

  np.testing.assert_array_equal(said(first), said(second))
  other = tiny_trained(
    num_classes=10, resolutions=(16, 32, 64), predictor_px=16, spread=2.0
  )
  with Checkpoints(path, 'finetune', keep=None) as checkpoints:
    checkpoints.save_weights(8, other.params, other.batch_stats)
  third = Classifier.load(path, runtime='onnx')
  assert third.contract.origin == 'stage finetune, step 8'
  assert np.abs(said(third) - said(second)).max() > 0.01
  step = os.path.join(path, 'checkpoints', 'finetune', '7')
  np.testing.assert_array_equal(
    said(Classifier.load(step, runtime='onnx')), said(first)
  )
  # It can still be exported: the weights are read for that.
  second.export(str(tmp_path / 'out'), formats=('onnx',))
  assert 'contract.json' in os.listdir(tmp_path / 'out')


def test_weights_are_told_apart(trained):
  one = Classifier.of(trained, runtime='onnx')
  two = Classifier.of(tiny_trained(spread=2.0), runtime='onnx')
  assert len(os.listdir(cache.path('models'))) == 2
  a, b = (c.predict([pictures(1)[0]])[0].probabilities for c in (one, two))
  assert np.abs(a - b).max() > 1e-3


def test_a_cache_that_cannot_be_written_is_done_without(trained, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/proc/nothing')
  reference = Classifier.of(trained, runtime='jax', batch=4)
  found = Classifier.of(trained, runtime='onnx')
  assert parity.compare(reference, found, list(pictures(10))).holds


def test_of_two_that_write_at_once_one_is_kept():
  def write(folder):
    pathlib.Path(folder, 'file').write_text('written')

  def write_slowly(folder):
    write(folder)
    cache.make_folder('kind', 'key', write)  # another is faster

  made = cache.make_folder('kind', 'key', write_slowly)
  assert os.listdir(cache.path('kind')) == ['key']
  assert os.listdir(made) == ['file']


def test_what_nobody_asks_for_is_cleared_away():
  old = cache.make_folder('kind', 'old', lambda folder: None)
  new = cache.make_folder('kind', 'new', lambda folder: None)
  for folder in (old, new):
    os.utime(folder, (0, 0))
  assert cache.folder('kind', 'new')  # asked for
  cache.make_folder('kind', 'another', lambda folder: None)
  assert sorted(os.listdir(cache.path('kind'))) == ['another', 'new']


# What a command imports.

COUNT = """
import sys
from drnet_jax.__main__ import main
sys.argv = ['drnet_jax', *sys.argv[1:]]
main()
heavy = ('jax', 'jaxlib', 'flax', 'orbax', 'optax', 'grain', 'matplotlib',
         'tensorflow_datasets', 'scipy', 'sklearn', 'ml_collections', 'yaml',
         'onnx', 'torch', 'openvino', 'onnxruntime')
there = [name for name in heavy if name in sys.modules]
print('imported', ' '.join(there))
"""


def imported(*arguments):
  done = subprocess.run(
    [sys.executable, '-c', COUNT, *arguments],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  line = done.stdout.splitlines()[-1]
  assert line.startswith('imported')
  return set(line.split()[1:]), done.stderr


@pytest.fixture
def photo(tmp_path):
  path = tmp_path / 'photo.png'
  path.write_bytes(encoded(pictures(1, side=64)[0]))
  return str(path)


def test_an_exported_folder_is_run_by_one_runtime_alone(
  trained, photo, tmp_path
):
  folder = str(tmp_path / 'out')
  Classifier.of(trained, runtime='jax', batch=1).export(
    folder, formats=('onnx',)
  )
  ask = ('predict', f'--workdir={folder}', photo)
  _, said = imported(*ask)  # finds out which
  found, again = imported(*ask)
  assert said == again and said.startswith('Runs in ')
  assert len(found) == 1 and found < {'onnxruntime', 'openvino'}
  found, _ = imported(*ask, '--runtime=onnx')
  assert found == {'onnxruntime'}


def test_a_run_needs_jax_once(run, photo):
  ask = ('predict', f'--workdir={run}', '--runtime=onnx', photo)
  found, _ = imported(*ask)
  assert {'jax', 'orbax'} < found
  assert not found & {'grain', 'matplotlib', 'tensorflow_datasets'}
  found, said = imported(*ask)
  assert found == {'onnxruntime'} and said == 'Runs in onnx\n'


def test_onnxruntime_tells_nobody_what_it_runs(trained, photo, tmp_path):
  folder = str(tmp_path / 'out')
  classifier = Classifier.of(trained, runtime='jax', batch=1)
  classifier.export(folder, formats=('onnx',))
  (tmp_path / 'home').mkdir()
  home = dict.fromkeys(('HOME', 'XDG_CACHE_HOME'), str(tmp_path / 'home'))
  environment = os.environ | home | {'PYTHONPATH': str(ROOT)}
  del environment['ORT_DISABLE_TELEMETRY']
  ours = ['-m', 'drnet_jax', 'predict', f'--workdir={folder}', '--runtime=onnx']
  for command in (ours, [os.path.join(folder, 'run.py')]):
    done = subprocess.run(
      [sys.executable, *command, photo],
      env=environment,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    # It keeps a number for the machine, and what it has not sent yet.
    left = {path.name for path in (tmp_path / 'home').rglob('*')}
    assert not left & {'deviceid', 'onnxruntime.db'}


@needs_openvino
def test_openvino_tells_nobody_that_it_was_imported():
  program = """
import os, sys
os.fork = None
from drnet_jax.serve import openvino
openvino.core()
assert 'openvino' in sys.modules
assert not [name for name in sys.modules if 'openvino_telemetry' in name]
"""
  subprocess.run(
    [sys.executable, '-c', program],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    check=True,
  )


def test_help_imports_next_to_nothing():
  found, _ = imported('predict', '--help')
  assert not found
