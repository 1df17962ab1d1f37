# SPDX-License-Identifier: Apache-2.0
"""Is what a device computes right? Checks for a device that is new to us."""

import functools
import tempfile
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from drnet_jax import losses, routing
from drnet_jax import mesh as mesh_lib
from drnet_jax.bench.subjects import drnet, pictures, ranet, untrained
from drnet_jax.choosing.policy import Policy
from drnet_jax.export.contract import Contract
from drnet_jax.models.drnet import DRNet
from drnet_jax.run.checkpoint import Checkpoints
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.stages import StageEngine
from drnet_jax.steps import state as state_lib
from drnet_jax.steps.routed import RoutedStep
from drnet_jax.steps.routed_objective import RoutedObjective
from drnet_jax.steps.state import TrainState

_SGD = optax.sgd(1.0)  # the change of the parameters is the gradient
_KEY = jax.random.key(11)
_OBJECTIVE = {
  'label_smoothing': 0.0,
  'gradient': 'all',
  'explore': 1.0,
  'loss': 'expected',
  'statistics': 'batch',
  'tau': (0.8, 0.8),
  'tau_epochs': 0,
  'eta': 0.7,
  'eta_warmup_epochs': 0,
  'target_epochs': 0,
  'usage_weight': 0.0,
  'bucket_growth': 1.5,
  'costs': (),
}
_TARGET_SHARE = 0.3
_HALF = 0.25  # what rounding may change of a gradient; on CPUs .17
# Multiply-adds up to the last exit, as the authors' counter prints.
_RANET, _RANET_MACS = 'cifar_budgeted_small', 58_921_020
_EXIT_CONFIDENCE = 0.12  # of ten classes: some images leave early


def all_checks(small: bool) -> Iterator[dict]:
  """A row per check: what was found, its bound, and whether it is kept."""
  size = 16 if small else 64
  # TF32 would be another network.
  with jax.default_matmul_precision('highest'):
    model = _drnet(small, 'float32')
    exact, dense = _gradients(model, size), _gradients(model, size, dense=True)
    worst = max(_error(exact[name], dense[name]) for name in exact)
    yield _row('routed step against dense, float32', worst, 1e-4)
    yield from _exits(small)
    yield _checkpoint(model)
  halved = _gradients(_drnet(small, 'bfloat16'), size)
  for name, ours in halved.items():
    error = _error(ours, exact[name])
    yield _row(f'bfloat16 against float32, {name}', error, _HALF)


def _row(check: str, value: float, bound: float) -> dict:
  return {
    'what': check,
    'value': float(value),
    'bound': bound,
    'right': bool(value <= bound),
  }


def _drnet(small: bool, dtype: str) -> DRNet:
  network = {
    'network': 'resnet',
    'stage_sizes': (1,) if small else (1, 1, 1),
    'width': 8 if small else 64,
    'stem': 'patch',
  }
  return drnet(
    (16, 32),
    base=network | {'dtype': dtype},
    # Of full precision, so that it chooses the same sizes.
    predictor=network,
    predictor_px=16,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    num_classes=10,
  )


def _gradients(model: DRNet, size: int, *, dense: bool = False) -> dict:
  """By group of parameters: gradients as dispatched, or of the reference."""
  mesh = mesh_lib.create(1)
  target = _TARGET_SHARE * model.macs().gmacs[-1]
  objective = RoutedObjective(target_gmacs=target, **_OBJECTIVE)
  images = np.stack(pictures(size, model.image_px))
  labels = np.arange(size, dtype=np.int32) % 10
  batch = mesh_lib.shard_batch({'image': images, 'label': labels}, mesh)
  state = state_lib.begin(_SGD, *jax.jit(model.init)(jax.random.key(5)))
  state = jax.device_put(state, mesh_lib.replicated(mesh))
  before = jax.device_get(state.params)
  if dense:
    params, _, _ = dense_step(model, state, batch, objective, _KEY)
  else:
    step = RoutedStep(
      model, _SGD, mesh, objective, batch_size=size, steps_per_epoch=1
    )
    step.compile(state, batch, _KEY)
    params = step(state, batch, _KEY)[0].params
  return jax.tree.map(np.subtract, before, jax.device_get(params))


def _error(ours, theirs) -> float:
  """Length of the difference over that of `theirs`."""

  def length(tree) -> float:
    return float(
      np.sqrt(sum((x.astype(float) ** 2).sum() for x in jax.tree.leaves(tree)))
    )

  return length(jax.tree.map(np.subtract, ours, theirs)) / length(theirs)


def dense_step(
  model: DRNet,
  state: TrainState,
  batch: Mapping[str, jax.Array],
  objective: RoutedObjective,
  key: jax.Array,
):
  """One routed step without dispatch: all sizes on all images, masked.

  As `RoutedStep` on one device, with the whole batch explored; of the objective
  only what is used below counts.

  Returns:
    New (params, batch_stats) by plain SGD of rate 1, and the choice [B].
  """
  images, labels = batch['image'], batch['label']
  gmacs = jnp.asarray(model.macs().gmacs)
  noise_key, _ = jax.random.split(jax.random.fold_in(key, 0))

  def route(predictor):
    scores, stats = model.predict(
      predictor, state.batch_stats['predictor'], images, train=True
    )
    h = routing.straight_through(noise_key, scores, tau=objective.tau[0])
    return h, jax.nn.softmax(scores), stats

  choice = np.asarray(jax.jit(route)(state.params['predictor'])[0].argmax(-1))

  def cross_entropy(logits):
    return losses.cross_entropy(logits, labels, label_smoothing=0.0)

  def total(params):
    h, p, predictor_stats = route(params['predictor'])
    norm_stats = dict(state.batch_stats['norm'])
    value = 0.0
    for j in np.unique(choice):
      size_px, mask = model.resolutions[j], choice == j
      name = model.norm_set(size_px)
      old = norm_stats[name]
      logits, new = model.classify(
        params['base'],
        params['norm'][name],
        old,
        images,
        size_px,
        train=objective.statistics == 'batch',
        mask=jnp.asarray(mask),
      )
      weight = min(1.0, mask.sum() * h.shape[1] / len(choice))
      norm_stats[name] = jax.tree.map(
        lambda a, b, w=weight: (1 - w) * a + w * b, old, new
      )
      chosen = objective.gradient == 'chosen'
      entry = h[:, j] if chosen else jnp.ones(len(choice))
      each = cross_entropy(entry[:, None] * logits)
      value += jnp.where(mask, each, 0.0).mean()
    value += objective.eta * losses.flops_hinge(
      h, gmacs, target_gmacs=objective.target_gmacs
    )
    if objective.gradient == 'all':
      running = model.all_logits(state.params, state.batch_stats, images)
      if objective.loss == 'mixture':
        mixed = (h[:, :, None] * running).sum(1)
        value += cross_entropy(mixed).mean()
      else:
        each = jax.vmap(cross_entropy, 1, 1)(running)
        value += (p * each).sum(1).mean()
    return value, {'norm': norm_stats, 'predictor': predictor_stats}

  grads, stats = jax.jit(jax.grad(total, has_aux=True))(state.params)
  return jax.tree.map(jnp.subtract, state.params, grads), stats, choice


def _exits(small: bool) -> Iterator[dict]:
  """RANet: its cost, stages against the whole, and a cascade's answers."""
  network = {'configuration': _RANET}
  if small:
    network = {'stem': 'cifar', 'width': 8, 'growth': 4, 'layers': 2}
    network |= {'levels': (1,), 'factors': (1,)}
  model = ranet(network, 32, 10)
  if not small:
    differ = abs(model.macs().sizes[-1] - _RANET_MACS)
    yield _row('RANet, multiply-adds', differ, 0)
  weights = model.init(jax.random.key(0))
  images = np.stack(pictures(32, 32))
  whole = np.asarray(jax.jit(model.all_logits)(*weights, images))  # [B, E, K]
  state, worst = images, 0.0
  for k in range(model.network.num_exits):
    logits, state = jax.jit(functools.partial(model.stage, k + 1))(
      *weights, state
    )
    worst = max(worst, np.abs(logits - whole[:, k]).max() / np.ptp(whole))
  yield _row('RANet, stage by stage against whole', worst, 1e-4)

  p = np.asarray(jax.nn.softmax(whole))
  leaves = p.max(-1) >= _EXIT_CONFIDENCE
  leaves[:, -1] = True
  exits = leaves.argmax(1)
  labels = p[np.arange(len(p)), exits].argmax(-1)
  found = _cascade(model, weights, images)
  differ = np.mean(found != np.stack([labels, exits], 1))
  yield _row('cascade against record, share that differs', differ, 0)


def _cascade(model, weights, images) -> np.ndarray:
  """Label and index of the exit of each image, as served: int [B, 2]."""
  trained = untrained(model, weights, 10)
  contract = Contract.of(trained)
  engine = StageEngine(trained, batches=[len(images)])
  classifier = Classifier(contract, engine)
  names = contract.options.names
  limits = (_EXIT_CONFIDENCE,) * (len(names) - 1)
  every = tuple(range(len(names)))
  classifier.policy = Policy(every, None, limits, signal='probability')
  answers = classifier.predict(list(images))
  return np.array([(x.label, names.index(x.option)) for x in answers])


def _checkpoint(model: DRNet) -> dict:
  """Weights saved from the device, read by a CPU: share of arrays changed."""
  saved = jax.jit(model.init)(jax.random.key(1))
  cpu = Mesh(np.array(jax.devices('cpu')[:1]), ('data',))
  with tempfile.TemporaryDirectory() as folder:
    with Checkpoints(folder, 'written', keep=1) as checkpoints:
      checkpoints.save_weights(0, *saved)
    with Checkpoints(folder, 'written', keep=None) as checkpoints:
      read = checkpoints.restore_weights(
        0,
        *model.shapes,
        mesh_lib.replicated(cpu),
      )
  pairs = zip(jax.tree.leaves(saved), jax.tree.leaves(read), strict=True)
  changed = [not np.array_equal(a, b) for a, b in pairs]
  return _row('checkpoint read by a CPU, changed', np.mean(changed), 0)
