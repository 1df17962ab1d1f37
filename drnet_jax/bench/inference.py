# SPDX-License-Identifier: Apache-2.0
"""Is it worth it here? Times inference on this machine, path by path.

    python -m drnet_jax benchmark --workdir=runs/quickstart
    python -m drnet_jax benchmark --network=resnet50 --out=runs/speed

With a workdir: its model, its test images, the sizes that its predictor
chooses. With a network's name: DR-ResNet of random weights (predictor ResNet-10
at 128 px, 1000 classes), synthetic JPEGs, and sizes drawn with `--shares` while
the predictor runs all the same.

Times, all paths in turn so that a machine that changes its speed does so for
all, medians of the rounds:

* every network by itself, per size and batch;
* whole predictions, routed against fixed at the largest size of the same path:
  one at a time, and in bulk. `implied` is the ratio of their multiply-adds,
  predictor counted; `realised` that of their times;
* where the time of a single prediction goes: decode, resize, predictor,
  network, and what the host does between;
* decoding files whole against decoding them no larger than needed
  (`decode='scaled'`), and how many answers that changes.

Leaves `speed.csv`, `worth.csv`, `parts.csv`, `decoding.csv` and the figure
`latency` (the paper's Figure 3 where the workdir was evaluated). Training steps
are timed by `drnet_jax benchmark_training`.

A network with exits is timed by `benchmark_exits`, with the same command.
"""

import csv
import dataclasses
import functools
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from PIL import Image

from drnet_jax import mesh as mesh_lib
from drnet_jax import models, resize, settings, terminal
from drnet_jax.bench import exits as benchmark_exits
from drnet_jax.bench import rivals
from drnet_jax.bench.stopwatch import interleaved
from drnet_jax.commands.cli import WORKDIR
from drnet_jax.data.pipeline import Data
from drnet_jax.errors import UserError
from drnet_jax.export import package
from drnet_jax.export.contract import DECODINGS, Contract
from drnet_jax.report import figures, policies
from drnet_jax.run import workdir
from drnet_jax.serve import budget, engines
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.engines import OnnxEngine, XlaEngine

PATHS = ('jax', 'onnx', 'torch')

_NETWORK = flags.DEFINE_string(
  'network',
  None,
  'Instead: a ResNet or a configuration of RANet by name, with random weights.',
)
_SIZES = flags.DEFINE_list(
  'sizes', ['112', '168', '224'], 'With --network: candidate sizes, px.'
)
_SHARES = flags.DEFINE_list(
  'shares', ['0.3', '0.45', '0.25'], 'With --network: of images at each size.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder; default <workdir>/report.')
_PATHS = flags.DEFINE_list('paths', list(PATHS), 'What to time.')
_BATCHES = flags.DEFINE_list('batches', ['1', '8'], 'Per size and batch.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Timed rounds.', 1)
_IMAGES = flags.DEFINE_integer('images', 80, 'Images of a bulk round.', 2)
_SINGLES = 20  # images of a round one at a time: enough to show the shares


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is timed.

  Attributes:
    trained: the model.
    contract: its contract.
    files: encoded images.
    labels: of them, or None where they show nothing.
    shares: of the images at each size; None where the predictor chooses.
    record: of the test split, if there is one: for the figure.
  """

  trained: workdir.Trained
  contract: Contract
  files: list[bytes]
  labels: list[int] | None
  shares: tuple[float, ...] | None
  record: policies.Record | None


class Drawn:
  """A policy that lets the predictor run and then ignores it.

  Args:
    shares: of the images at each size, in turn and as evenly as can be.
  """

  needs_predictor = True

  def __init__(self, shares: Sequence[float]):
    self._edges = np.cumsum(shares)
    self._seen = 0

  def __call__(self, log_p, views) -> np.ndarray:
    # Multiples of the golden ratio fall evenly into [0, 1).
    turns = (self._seen + np.arange(len(views))) * 0.6180339887498949 % 1.0
    self._seen += len(views)
    return np.minimum(
      np.searchsorted(self._edges, turns, side='right'), len(self._edges) - 1
    )

  def restart(self) -> None:
    """Begins the same order again."""
    self._seen = 0


def of_workdir(path: str, images: int) -> Subject:
  """The model of a run and images of its test split."""
  trained = workdir.load(path, mesh_lib.create(1))
  if not trained.has_router:
    raise UserError(f'{path}: its predictor is not trained yet')
  data = settings.call(Data, trained.config.data, 'config.data')
  examples = data.open(data.test_split).examples
  files = [examples[i]['image'] for i in range(min(images, len(examples)))]
  record = os.path.join(path, 'report', 'record.npz')
  return Subject(
    trained,
    Contract.of(trained),
    files,
    [int(examples[i]['label']) for i in range(len(files))],
    None,
    policies.load(record) if os.path.exists(record) else None,
  )


def of_network(
  network: str, sizes: Sequence[int], shares: Sequence[float], images: int
) -> Subject:
  """A model of random weights and pictures of noise at many scales."""
  if len(shares) != len(sizes) or abs(sum(shares) - 1) > 1e-6:
    raise UserError(f'shares {shares} are not {len(sizes)} that add up to 1')
  class_names = tuple(str(i) for i in range(1000))
  model = models.create_drnet(
    base={'network': network},
    predictor={'network': 'resnet10'},
    predictor_px=128,
    image_px=max(sizes),
    resolutions=sizes,
    resolution_aware_bn=True,
    antialias=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    num_classes=len(class_names),
  )
  params, batch_stats = jax.jit(model.init)(jax.random.key(0))
  trained = workdir.Trained(
    model=model,
    params=params,
    batch_stats=batch_stats,
    has_router=True,
    class_names=class_names,
    config=ml_collections.ConfigDict(),
    origin='random weights',
  )
  contract = Contract.of_model(
    model,
    resize_px=round(model.image_px * 256 / 224),
    keep_aspect=True,
    has_router=True,
    decode='full',
    class_names=class_names,
    origin=trained.origin,
  )
  files = [_noise_jpeg(seed) for seed in range(min(images, 16))]
  files = [files[i % len(files)] for i in range(images)]
  return Subject(trained, contract, files, None, tuple(shares), None)


def _noise_jpeg(seed: int) -> bytes:
  """A JPEG of 500 x 375, as large a file as a photograph of that size."""
  rng = np.random.default_rng(seed)
  picture = np.zeros((375, 500, 3), np.float32)
  for side in (4, 12, 36, 108, 324):
    noise = rng.uniform(0, 255, (side * 3 // 4, side, 3)).astype(np.uint8)
    layer = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
    picture += np.asarray(layer, np.float32) / 5
  file = io.BytesIO()
  Image.fromarray(picture.astype(np.uint8)).save(file, 'JPEG', quality=90)
  return file.getvalue()


class Contenders:
  """The paths of one subject, made once.

  Args:
    subject: what is timed.
    paths: of PATHS; 'torch' is left out where it has no rival to offer, and
      with 'onnx' has a second, its own export.
    batches: sizes of batch to time.
    rival: name of the network that PyTorch should run beside.
  """

  def __init__(
    self,
    subject: Subject,
    paths: Sequence[str],
    batches: Sequence[int],
    *,
    rival: str = '',
  ):
    unknown = set(paths) - set(PATHS)
    if unknown:
      raise UserError(f'--paths: {sorted(unknown)} are not among {PATHS}')
    self.subject = subject
    self.batches = sorted({1, *batches})
    self.classifiers: dict[str, Classifier] = {}
    self.rivals: dict[str, Callable] = {}
    # Resizing alone, of each path: to the predictor's and to each size.
    self.resizers: dict[str, dict[int, Callable]] = {}
    trained, contract = subject.trained, subject.contract
    programs = engines.programs(trained, contract)
    views = {
      f'view{px}': (_resizer(trained.model, px), (), contract.image_px)
      for px in {contract.predictor_px, *contract.resolutions}
    }
    if 'jax' in paths:
      engine = XlaEngine('jax', programs, contract, batches=self.batches)
      self._add(engine)
      self.resizers['jax'] = {
        int(name[4:]): _jitted(program) for name, (program, *_) in views.items()
      }
    if 'onnx' in paths:
      with tempfile.TemporaryDirectory() as folder:
        package.write_onnx(folder, programs | views, fold_norms=True)
        engine = OnnxEngine(folder, contract)
        engine.best_batch = self.batches[-1]
        self._add(engine)
        self.resizers['onnx'] = {
          int(name[4:]): _session(os.path.join(folder, f'{name}.onnx'))
          for name in views
        }
    if 'torch' in paths and rivals.is_offered(rival):
      classes = len(contract.class_names)
      self.rivals['torch'] = rivals.in_torch(rival, classes)
      if 'onnx' in paths:
        self.rivals['torch, onnx'] = rivals.in_onnxruntime(rival, classes)

  def _add(self, engine) -> None:
    self.classifiers[engine.name] = Classifier(self.subject.contract, engine)


def _resizer(model, size_px: int) -> Callable:
  def view(weights, images):
    return resize.network_view(
      images,
      size_px,
      mean=model.mean,
      std=model.std,
      antialias=model.antialias,
    )

  return view


def _jitted(program: Callable) -> Callable:
  return jax.jit(functools.partial(program, ()))


def _session(path: str) -> Callable:
  session = engines.onnx_session(path)
  return lambda images: session.run(None, {'images': images})[0]


def time_networks(contenders: Contenders, rounds: int) -> list[dict]:
  """Each network by itself: a row per path, part, batch."""
  contract = contenders.subject.contract
  rng = np.random.default_rng(0)
  shape = (contract.image_px, contract.image_px, 3)
  jobs = {}
  for batch in contenders.batches:
    images = rng.integers(0, 256, (batch, *shape), dtype=np.uint8)
    for name, classifier in contenders.classifiers.items():
      run, log_p = classifier.engine.probabilities, classifier.engine.log_p
      jobs[name, 'predictor', batch] = _waiting(log_p, images)
      for j, size_px in enumerate(contract.resolutions):
        jobs[name, f'{size_px} px', batch] = _waiting(run, j, images)
    for name, rival in contenders.rivals.items():
      for size_px in contract.resolutions:
        small = rng.integers(
          0, 256, (batch, size_px, size_px, 3), dtype=np.uint8
        )
        jobs[name, f'{size_px} px', batch] = _waiting(rival, small)
  gmacs = dict(
    zip([f'{r} px' for r in contract.resolutions], contract.gmacs, strict=True)
  ) | {'predictor': contract.predictor_gmacs}
  rows = []
  for (path, part, batch), taken in interleaved(
    jobs, rounds, 'networks'
  ).items():
    ms = 1e3 * float(np.median(taken)) / batch
    rows.append(
      {
        'path': path,
        'part': part,
        'batch': batch,
        'gmacs': gmacs[part],
        'ms_per_image': ms,
        'images_per_second': 1e3 / ms,
        'gmacs_per_second': 1e3 * gmacs[part] / ms,
      }
    )
  return rows


def _waiting(function: Callable, *arguments) -> Callable[[], Any]:
  return lambda: np.asarray(function(*arguments))


def time_predictions(contenders: Contenders, rounds: int) -> list[dict]:
  """Whole predictions, routed and fixed: a row per path and mode."""
  subject, jobs, chosen = contenders.subject, {}, {}
  contract = subject.contract
  largest = budget.Fixed(len(contract.resolutions) - 1)
  for name, classifier in contenders.classifiers.items():
    # As large as evaluation resizes to, so that only the crop is left to do.
    arrays = [
      classifier.picture(file).crop(contract.resize_px)
      for file in subject.files
    ]
    sources = {
      'single': arrays[:_SINGLES],
      'bulk': arrays,
      'bulk, files': subject.files,
    }
    for mode, images in sources.items():
      for kind in ('routed', 'fixed'):
        policy = (
          largest
          if kind == 'fixed'
          else Drawn(subject.shares)
          if subject.shares
          else budget.Dial(contract.gmacs, 0.0, 0.0, 0.0)
        )
        job = functools.partial(
          _predict, classifier, policy, images, mode == 'single', chosen, mode
        )
        jobs[name, mode, kind] = job
  taken = interleaved(jobs, rounds, 'predictions')
  rows = []
  for name in contenders.classifiers:
    for mode, images in sources.items():
      routed, fixed = taken[name, mode, 'routed'], taken[name, mode, 'fixed']
      mean_gmacs = chosen[mode]
      implied = contract.gmacs[-1] / mean_gmacs
      realised = float(np.median(fixed / routed))
      rows.append(
        {
          'path': name,
          'mode': mode,
          'fixed_ms': 1e3 * float(np.median(fixed)) / len(images),
          'routed_ms': 1e3 * float(np.median(routed)) / len(images),
          'gmacs': mean_gmacs,
          'implied': implied,
          'realised': realised,
          'realised_of_implied': realised / implied,
        }
      )
  return rows


def _predict(classifier, policy, images, singly, chosen, mode) -> None:
  if isinstance(policy, Drawn):
    policy.restart()
  classifier.policy = policy
  if singly:
    answers = [classifier.predict([image])[0] for image in images]
  else:
    answers = classifier.predict(images)
  if policy.needs_predictor:
    chosen[mode] = float(np.mean([x.gmacs for x in answers]))


def time_parts(contenders: Contenders, rounds: int) -> list[dict]:
  """Where the time of a single routed prediction from a file goes.

  The parts are timed in turn with the whole, and compared round by round: this
  machine may be faster in one round than in the next.
  """
  subject = contenders.subject
  contract = subject.contract
  files = subject.files[:_SINGLES]
  jobs, shares = {}, {}
  for name, classifier in contenders.classifiers.items():
    policy = (
      Drawn(subject.shares)
      if subject.shares
      else budget.Dial(contract.gmacs, 0.0, 0.0, 0.0)
    )
    jobs[name, 'whole'] = functools.partial(
      _predict, classifier, policy, files, True, {}, ''
    )
    jobs[name, 'decode'] = functools.partial(_decode_all, classifier, files)
    crop = classifier.picture(files[0]).crop(contract.image_px)[None]
    for px, resizer in contenders.resizers[name].items():
      jobs[name, px] = _waiting(resizer, crop)
    engine = classifier.engine
    jobs[name, 'predictor'] = _waiting(engine.log_p, crop)
    for j in range(len(contract.resolutions)):
      jobs[name, 'network', j] = _waiting(engine.probabilities, j, crop)
    classifier.policy = policy
    views = [classifier.view(classifier.picture(file)) for file in files]
    choice = classifier.choose(views)
    shares[name] = np.bincount(choice, minlength=len(contract.gmacs)) / len(
      choice
    )
  ms = {
    key: 1e3 * taken
    for key, taken in interleaved(jobs, rounds, 'parts').items()
  }
  rows = []
  for name in contenders.classifiers:
    whole = ms[name, 'whole'] / len(files)
    decode = ms[name, 'decode'] / len(files)
    predictor = ms[name, 'predictor']
    to_predictor = ms[name, contract.predictor_px]
    to_sizes = shares[name] @ [ms[name, px] for px in contract.resolutions]
    network = shares[name] @ [
      ms[name, 'network', j] for j in range(len(contract.resolutions))
    ]
    parts = {
      'decode': decode,
      'resize': to_predictor + to_sizes,
      'predictor': predictor - to_predictor,
      'network': network - to_sizes,
      'host': whole - decode - predictor - network,
    }
    rows += [
      {
        'path': name,
        'part': part,
        'ms': float(np.median(taken)),
        'share': float(np.median(taken / whole)),
      }
      for part, taken in parts.items()
    ]
  return rows


def time_decoding(subject: Subject, rounds: int) -> list[dict]:
  """Decoding files whole, and no larger than needed: a row for each.

  Answers are compared in the exported path: `same_label` and `same_size` are
  shares of the images, `top1` is known where labels are.
  """
  files = subject.files
  classifiers, answers = {}, {}
  for decode in DECODINGS:
    contract = dataclasses.replace(subject.contract, decode=decode)
    with tempfile.TemporaryDirectory() as folder:
      programs = engines.programs(subject.trained, contract)
      package.write_onnx(folder, programs, fold_norms=True)
      classifier = Classifier(contract, OnnxEngine(folder, contract))
    if subject.shares:
      classifier.policy = Drawn(subject.shares)
    classifiers[decode] = classifier
    answers[decode] = classifier.predict(files)
  sizes = subject.contract.resolutions
  jobs = {
    decode: functools.partial(
      _decode_as_chosen,
      classifier,
      files,
      [sizes.index(x.size_px) for x in answers[decode]],
    )
    for decode, classifier in classifiers.items()
  }
  rows = []
  for decode, seconds in interleaved(jobs, rounds, 'decoding').items():
    pairs = list(zip(answers[decode], answers['full'], strict=True))
    row = {
      'decode': decode,
      'ms_per_image': 1e3 * float(np.median(seconds)) / len(files),
      'same_label': float(np.mean([a.label == b.label for a, b in pairs])),
      'same_size': float(np.mean([a.size_px == b.size_px for a, b in pairs])),
      'top1': '',
    }
    if subject.labels:
      found = [x.label for x in answers[decode]]
      row['top1'] = float(np.mean(np.equal(found, subject.labels)))
    rows.append(row)
  return rows


def _decode_as_chosen(classifier, files, choice) -> None:
  for file, j in zip(files, choice, strict=True):
    picture = classifier.picture(file)
    classifier.view(picture)
    classifier.crop(picture, j)


def _decode_all(classifier: Classifier, files: Sequence[bytes]) -> None:
  for file in files:
    classifier.picture(file).crop(classifier.contract.image_px)


def verdict(worth: list[dict], speed: list[dict]) -> str:
  """Whether routing pays on this machine, in a few lines."""
  lines = []
  for row in worth:
    verb = 'pays' if row['realised'] > 1 else 'does not pay'
    lines.append(
      f'{row["path"]}, {row["mode"]}: routing {verb}, {row["realised"]:.2f} x '
      f'as fast as the largest size ({row["implied"]:.2f} x implied, '
      f'{row["realised_of_implied"]:.0%} of it).'
    )
  for mode in dict.fromkeys(row['mode'] for row in worth):
    best = min(
      (row for row in worth if row['mode'] == mode),
      key=lambda row: row['routed_ms'],
    )
    lines.append(
      f'Fastest path, {mode}: {best["path"]}, {best["routed_ms"]:.3g} ms an '
      f'image routed, {best["fixed_ms"]:.3g} ms fixed.'
    )
  largest = {
    row['path']: row['ms_per_image']
    for row in speed
    if row['batch'] == 1 and row['gmacs'] == max(r['gmacs'] for r in speed)
  }
  lines.append(
    'The largest size alone, batch 1: '
    + ', '.join(f'{path} {ms:.3g} ms' for path, ms in largest.items())
    + '.'
  )
  return '\n'.join(lines)


def draw(subject: Subject, speed: list[dict], path: str) -> None:
  """Figure 3: accuracy (or multiply-adds) against latency at batch 1.

  Args:
    subject: its record, if any, knows the accuracy.
    speed: from `time_networks`.
    path: of the files, without ending.
  """
  contract, record = subject.contract, subject.record
  ms = {
    (row['path'], row['part']): row['ms_per_image']
    for row in speed
    if row['batch'] == 1
  }
  curves = []
  for name in dict.fromkeys(row['path'] for row in speed):
    sizes = [ms[name, f'{r} px'] for r in contract.resolutions]
    if record is None:
      curves.append((name, sizes, list(contract.gmacs)))
      continue
    fixed = [100 * policy.top1 for policy in policies.fixed(record)]
    curves.append((f'{name}, fixed sizes', sizes, fixed))
    if (name, 'predictor') in ms:
      routed = policies.routed(record)
      latency = ms[name, 'predictor'] + routed.shares @ sizes
      curves.append((f'{name}, routed', [latency], [100 * routed.top1]))
  label = 'GMACs' if record is None else 'top-1, %'
  figures.latency(curves, label, path)


def run() -> None:
  if bool(WORKDIR.value) == bool(_NETWORK.value):
    raise UserError('give --workdir, a trained run, or --network, a name')
  to = _OUT.value or (WORKDIR.value and os.path.join(WORKDIR.value, 'report'))
  if not to:
    raise UserError('--out is missing: name a folder for the results')
  try:
    sizes = [int(x) for x in _SIZES.value]
    batches = [int(x) for x in _BATCHES.value]
    shares = [float(x) for x in _SHARES.value]
  except ValueError as error:
    raise UserError(f'--sizes, --batches, --shares: {error}') from error
  exits = benchmark_exits.subject(WORKDIR.value or '', _NETWORK.value or '')
  if exits:
    benchmark_exits.run(
      exits, to, batches=batches, rounds=_ROUNDS.value, images=_IMAGES.value
    )
    return
  if WORKDIR.value:
    subject = of_workdir(WORKDIR.value, _IMAGES.value)
  else:
    subject = of_network(_NETWORK.value, sizes, shares, _IMAGES.value)
  contenders = Contenders(
    subject, _PATHS.value, batches, rival=_NETWORK.value or ''
  )
  speed = time_networks(contenders, _ROUNDS.value)
  worth = time_predictions(contenders, _ROUNDS.value)
  parts = time_parts(contenders, _ROUNDS.value)
  tables = {'speed': speed, 'worth': worth, 'parts': parts}
  if 'onnx' in contenders.classifiers:
    tables['decoding'] = time_decoding(subject, _ROUNDS.value)
  device = jax.devices()[0].device_kind
  print(f'{device}, {os.cpu_count()} processor cores\n')
  os.makedirs(to, exist_ok=True)
  for name, rows in tables.items():
    print(
      terminal.table([{k: _short(v) for k, v in row.items()} for row in rows])
    )
    print()
    with open(os.path.join(to, f'{name}.csv'), 'w', newline='') as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  draw(subject, speed, os.path.join(to, 'latency'))
  print(verdict(worth, speed))
  print(f'Written to {to}: {", ".join(tables)} (.csv), latency (.png, .svg)')


def _short(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)
