# SPDX-License-Identifier: Apache-2.0
"""TPUs without a TPU: every program is lowered for one, and linted.

Meshes are abstract: nothing is compiled and no device is needed. What a lint
finds is in EXPLAINED, with its reason, or fails.
"""

import collections
import concurrent.futures
import functools
import re
import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from drnet_jax import mesh as mesh_lib
from drnet_jax import models, routing, settings
from drnet_jax.bench.subjects import untrained
from drnet_jax.export.contract import Contract
from drnet_jax.export.programs import programs
from drnet_jax.run import stage as stage_lib
from drnet_jax.run.recording import Evaluator
from drnet_jax.steps import ahead
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.augment import BatchAugmentation
from drnet_jax.steps.exits import ExitsStep
from drnet_jax.steps.pretrain import PretrainStep
from drnet_jax.steps.routed import RoutedStep

LOCAL_BATCH = 64  # images of a device
# Shardy's, and those by which a shard_map is entered and left.
KNOWN_CALLS = {'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape'}
# Module (or function) of a product of float32 in a network of bfloat16: why.
EXPLAINED_DTYPES = {
  'head': 'ties of bfloat16 logits would make an argmax depend on the backend',
  '_resize': 'pixels: 1 % of the multiply-adds, and the antialias is precise',
}
# Channels that are no multiple of a TPU's 128 lanes, by network and module.
EXPLAINED_CHANNELS = {
  'stem_conv': 'the image has 3 channels; 3 % of the multiply-adds',
  'stage1': "the paper's network begins with 64 channels; half a tile is idle",
}


class Lowering:
  """In place of `ahead.Compiling`: traces, and lowers for TPUs."""

  cached = 0

  def __init__(self):
    self.found = collections.defaultdict(list)

  def __enter__(self) -> 'Lowering':
    return self

  def __exit__(self, *error) -> None:
    pass

  def __call__(self, program, *args) -> concurrent.futures.Future:
    traced = program.trace(*args)
    self.add(traced)
    future = concurrent.futures.Future()
    future.set_result(types.SimpleNamespace(out_info=traced.out_info))
    return future

  def add(self, traced) -> None:
    text = traced.lower(lowering_platforms=('tpu',)).as_text()
    self.found[traced.fun_name].append((traced, text))

  @property
  def counts(self) -> dict[str, int]:
    return {name: len(programs) for name, programs in self.found.items()}


def abstract_mesh(devices, shards=1):
  return AbstractMesh(
    (devices // shards, shards), ('data', 'shard'), (AxisType.Auto,) * 2
  )


def on(mesh, tree):
  """Shapes, lying as a state does."""
  return mesh_lib.placed(tree, mesh_lib.shardings(tree, mesh))


def batch_of(mesh, image_px, labels=None, local=LOCAL_BATCH):
  size, lies = local * mesh.size, mesh_lib.by_batch(mesh)
  return {
    'image': jax.ShapeDtypeStruct(
      (size, image_px, image_px, 3), np.uint8, sharding=lies
    ),
    'label': jax.ShapeDtypeStruct((size,), np.int32, sharding=lies),
  }


RESNET = 'drnet_jax.models.resnet:ResNet'


def drnet(network=RESNET, **fields):
  if network == RESNET:  # a bottleneck for each stage: ResNet-50 in small
    fields = {
      'stage_sizes': (1,),
      'block': models.resnet.BottleneckBlock,
    } | fields
  base = {'network': network, 'dtype': 'bfloat16'} | fields
  return models.create_drnet(
    base=base,
    predictor={
      'network': 'resnet',  # of basic blocks
      'stage_sizes': (1,),
      'dtype': 'bfloat16',
    },
    predictor_px=128,
    image_px=224,
    resolutions=(112, 224),
    resolution_aware_bn=True,
    antialias=True,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    num_classes=1000,
  )


def ranet():
  return models.create_ranet(
    network={
      'stem': 'cifar',
      'width': 16,
      'growth': 6,
      'layers': 2,
      'levels': (1, 2),
      'factors': (2, 1),
      'dtype': 'bfloat16',
    },
    image_px=32,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    num_classes=10,
  )


OPTIMIZER = optax.sgd(0.1, momentum=0.9)
ROUTED = {
  'label_smoothing': 0.1,
  'gradient': 'all',
  'explore': 0.25,
  'loss': 'expected',
  'statistics': 'fresh',
  'tau': (1.0, 1.0),
  'tau_epochs': 0,
  'eta': 0.1,
  'eta_warmup_epochs': 1,
  'target_gmacs': 2.0,
  'target_epochs': 0,
  'usage_weight': 0.1,
  'bucket_growth': 4.0,
  'costs': (),
}
STEPS = {
  'routed': (RoutedStep, drnet, ROUTED),
  'pretrain': (
    PretrainStep,
    drnet,
    {'label_smoothing': 0.1, 'distill': 0.5, 'teacher': 'largest'},
  ),
  'exits': (ExitsStep, ranet, {'label_smoothing': 0.1}),
}


def abstract_state(mesh, model):
  return on(mesh, state_lib.abstract(model, OPTIMIZER))


def lowered_step(monkeypatch, kind, devices, shards):
  """All programs of a step, as `compile` would compile them."""
  step_class, make, objective = STEPS[kind]
  model, mesh = make(), abstract_mesh(devices, shards)
  lowering = Lowering()
  monkeypatch.setattr(ahead, 'Compiling', lambda options=None: lowering)
  step = step_class(
    model,
    OPTIMIZER,
    mesh,
    settings.call(step_class.objective_class, objective, 'objective'),
    batch_size=LOCAL_BATCH * devices,
    steps_per_epoch=100,
  )
  step.compile(abstract_state(mesh, model), batch_of(mesh, model.image_px))
  return lowering


def check(lowering):
  """What a TPU cannot run, or should not, in any of the programs."""
  for name, lowered in lowering.found.items():
    for traced, text in lowered:
      calls = set(re.findall(r'custom_call @?"?([\w.]+)', text))
      assert calls <= KNOWN_CALLS, (name, calls)
      assert not re.search(r'tensor<[^>]*\?', text), f'{name}: dynamic shape'
      assert 'f64' not in text, f'{name}: float64'
      for where, equation in equations(traced.jaxpr.jaxpr):
        primitive = equation.primitive.name
        assert 'callback' not in primitive, (name, primitive)
        if primitive in ('conv_general_dilated', 'dot_general'):
          left, right = (x.aval for x in equation.invars[:2])
          if min(left.ndim, right.ndim) < 2:
            continue  # a mean over the sizes, of a few numbers an image
          dtype = left.dtype
          assert dtype == 'bfloat16' or any(
            part in where for part in EXPLAINED_DTYPES
          ), f'{name}: {primitive} in {dtype} at {where}'


def equations(jaxpr, where=''):
  """(where, equation) of all, those of inner functions too."""
  for equation in jaxpr.eqns:
    here = f'{where}/{equation.source_info.name_stack}'
    yield here, equation
    values = [*equation.params.values()]
    if platforms := equation.params.get('branches_platforms'):
      values = [equation.params['branches'][platforms.index(None)]]
    for value in values:
      inner = getattr(value, 'jaxpr', None)
      if inner is not None:
        yield from equations(inner, f'{here}/{equation.params.get("name", "")}')


@pytest.mark.parametrize(
  'devices, shards',
  [pytest.param(8, 1, marks=pytest.mark.slow), (256, 256)],
)
def test_a_routed_step(monkeypatch, devices, shards):
  lowering = lowered_step(monkeypatch, 'routed', devices, shards)
  check(lowering)
  # 16 or 64 slots at two sizes
  assert lowering.counts == {
    '_route_batch': 1,
    '_explore_size': 2,
    '_learn_size': 2 * 2,
    '_refresh_size': 2,
    '_update_state': 1,
  }


@pytest.mark.parametrize(
  'kind, devices, shards', [('pretrain', 256, 1), ('exits', 8, 8)]
)
def test_a_step_of_one_program(monkeypatch, kind, devices, shards):
  lowering = lowered_step(monkeypatch, kind, devices, shards)
  check(lowering)
  assert lowering.counts == {'_train_step': 1}


def test_what_goes_with_a_step():
  model, mesh, lowering = drnet(), abstract_mesh(256, 256), Lowering()
  state, batch = abstract_state(mesh, model), batch_of(mesh, 224)
  key = ahead.KEY
  augment = BatchAugmentation(
    flip=0.5, mixup=0.2, cutmix=1.0, unlabelled=False, num_classes=9
  )
  call = augment.compiled(mesh)
  (jitted,) = (cell.cell_contents for cell in call.__closure__)
  lowering.add(jitted.trace(*batch.values(), key, state.step))
  average = jax.jit(
    functools.partial(state_lib.average, decay=0.99, accumulate=1)
  )
  lowering.add(average.trace(state_lib.weights(state), state))
  lowering.add(stage_lib._all_finite.trace(state_lib.weights(state)))
  judged = batch | {'valid': jax.ShapeDtypeStruct(batch['label'].shape, bool)}
  judge = Evaluator(model, mesh)._judge
  lowering.add(judge.trace(True, state.params, state.batch_stats, judged))
  check(lowering)
  assert sum(lowering.counts.values()) == 4


@pytest.mark.parametrize('network', [RESNET, 'inverted_residual4'])
def test_inference(network):
  model, lowering = drnet(network), Lowering()
  params, stats = model.shapes
  images = jax.ShapeDtypeStruct((128, 224, 224, 3), np.uint8)
  trained = untrained(model, (params, stats), 1000)
  contract = Contract.of(trained)
  for program in programs(trained, contract).values():
    lowering.add(jax.jit(program.function).trace(program.weights, images))
  check(lowering)
  assert lowering.counts == {'_log_p': 1, '_probabilities': 2}


def test_inference_with_exits():
  model, lowering = ranet(), Lowering()
  weights = model.shapes
  state = jax.ShapeDtypeStruct((128, 32, 32, 3), np.uint8)
  for k in range(1, model.network.num_exits + 1):
    stage = functools.partial(model.stage, k)
    traced = jax.jit(stage).trace(*weights, state)
    lowering.add(traced)
    _, state = traced.out_info
  check(lowering)
  assert sum(lowering.counts.values()) == len(model.options)


def test_channels_fill_the_lanes():
  """ResNet-50 forward: which channels are no multiple of 128."""
  model, found = drnet('resnet50'), set()
  params, stats = model.shapes
  images = jax.ShapeDtypeStruct((64, 224, 224, 3), np.uint8)
  traced = jax.jit(functools.partial(model.logits_at, size_px=224)).trace(
    params, stats, images
  )
  for where, equation in equations(traced.jaxpr.jaxpr):
    if equation.primitive.name == 'conv_general_dilated':
      *_, channels, features = equation.invars[1].aval.shape
      if channels % 128 or features % 128:
        found.add(where)
  assert len(found) == 1 + 3 * 3 + 1  # stem; stage 1 and its shortcut
  for where in found:
    assert any(part in where for part in EXPLAINED_CHANNELS), where


def test_buckets_fill_the_sublanes():
  for local in (32, 64, 128, 256, 512):
    ladder = routing.bucket_ladder(local, growth=1.125, platform='tpu')
    assert not any(rung % 8 for rung in ladder) and ladder[0] >= 16
