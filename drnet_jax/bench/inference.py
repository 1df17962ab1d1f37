# SPDX-License-Identifier: Apache-2.0
"""Times inference path by path; the command `benchmark` tells what and how."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from drnet_jax.bench import costs, rivals, stopwatch
from drnet_jax.bench.subjects import Predictions, Subject, policies_for
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.errors import UserError
from drnet_jax.export import DECODINGS, package
from drnet_jax.export import contract as contract_lib
from drnet_jax.export.contract import PREDICTOR, Contract
from drnet_jax.export.programs import Program, programs
from drnet_jax.models.drnet import DRNet
from drnet_jax.report import latencies, plots
from drnet_jax.serve import choice, engines, openvino
from drnet_jax.serve.classifier import Classifier
from drnet_jax.serve.engines import INT8, Engine, OnnxEngine
from drnet_jax.serve.openvino import OpenVinoEngine
from drnet_jax.serve.picture import Picture
from drnet_jax.serve.stages import StageEngine
from drnet_jax.serve.xla import XlaEngine

PATHS = ('jax', 'onnx', 'openvino', 'torch')
PLAIN = ', plain'  # of a path: the same graphs, without anything of ours
AS_IT_COMES = 'the full option, as it comes'
_FULL = 'the full option'  # that policies are timed against
_SAME = 0.01  # of implied speed-ups, from which a policy differs from it
_SINGLES = 20  # images of a round one at a time: enough to show the shares


class Contenders:
  """The paths of one subject, made once.

  Args:
    subject: what is timed.
    paths: of PATHS; () for those that are installed. 'torch' is left out where
      it has no rival to offer. A network with exits has 'jax'.
    batches: sizes of batch to time.
    rival: name of the network that PyTorch should run beside.
    int8: a folder that the subject was exported to in int8, for OpenVINO.
  """

  def __init__(
    self,
    subject: Subject,
    paths: Sequence[str],
    batches: Sequence[int],
    *,
    rival: str = '',
    int8: str | None = None,
  ):
    paths = paths or [
      path
      for path in PATHS
      if path not in choice.MODULES or choice.is_installed(choice.MODULES[path])
    ]
    if unknown := set(paths) - set(PATHS):
      raise UserError(f'--paths: {sorted(unknown)} are not among {PATHS}')
    self.subject = subject
    self.contract = subject.contract
    self.batches = sorted({1, *batches})
    self.classifiers: dict[str, Classifier] = {}
    self.rivals: dict[str, Callable] = {}
    self.plain: dict[str, rivals.PlainOpenVino] = {}
    # Resizing alone, of each path: to the predictor's and to each size.
    self.resizers: dict[str, dict[int, Callable]] = {}
    if isinstance(subject.trained.model, DRNet):
      self._add_sizes(paths, rival)
      if int8:
        self._add_int8(int8)
    else:
      self._add(StageEngine(subject.trained, batches=self.batches), {})
    if not self.classifiers:
      raise UserError(
        "--paths: 'torch' is only a rival; name a runtime of ours, too"
      )
    # What is timed against the most expensive option.
    self.policies = policies_for(subject, next(iter(self.classifiers.values())))

  def _add(self, engine: Engine, resizers: dict[int, Callable]) -> None:
    self.classifiers[engine.name] = Classifier(self.contract, engine)
    if resizers:
      self.resizers[engine.name] = resizers

  def _add_sizes(self, paths: Sequence[str], rival: str) -> None:
    contract, model = self.contract, self.subject.trained.model
    made = programs(self.subject.trained, contract)
    sides = {*contract.sizes_px}
    if contract.routes:
      sides.add(model.predictor_px)
    views = {px: functools.partial(model.view, size_px=px) for px in sides}
    if 'jax' in paths:
      engine = XlaEngine('jax', made, contract, batches=self.batches)
      self._add(engine, {px: jax.jit(view) for px, view in views.items()})
    if {'onnx', 'openvino'} & {*paths}:
      made = programs(self.subject.trained.in_float32(), contract)
      for px, view in views.items():
        made[f'view{px}'] = Program(
          lambda weights, images, view=view: view(images), (), model.image_px
        )
      with tempfile.TemporaryDirectory() as folder:
        package.write_onnx(folder, made, fold_norms=True)
        files = {px: os.path.join(folder, f'view{px}.onnx') for px in sides}
        self._add_exported(folder, files, paths)
    if 'torch' in paths and rivals.is_offered(rival):
      self.rivals['torch'] = rivals.in_torch(rival, len(contract.class_names))

  def _add_exported(
    self, folder: str, views: dict[int, str], paths: Sequence[str]
  ) -> None:
    contract, batch = self.contract, self.batches[-1]
    if 'onnx' in paths:
      resizers = {px: engines.onnx_network(view) for px, view in views.items()}
      self._add(OnnxEngine(folder, contract, batch=batch), resizers)
    if 'openvino' not in paths:
      return
    for precision in openvino.precisions(openvino.abilities()):
      made = openvino.networks([*views.values()], precision=precision)
      resizers = dict(zip(views, made, strict=True))
      engine = OpenVinoEngine(
        folder, contract, precision=precision, batch=batch
      )
      self._add(engine, resizers)
      self.plain[engine.name + PLAIN] = rivals.PlainOpenVino(
        folder, contract, precision
      )

  def _add_int8(self, folder: str) -> None:
    contract, _, fields = contract_lib.read(folder)
    if contract != self.contract or not fields.get('int8'):
      raise UserError(
        f'--int8={folder}: it is no int8 export of {self.contract.origin}'
      )
    precision = openvino.precisions(openvino.abilities())[0]
    beside = engines.full_name('openvino', precision)
    if beside not in self.resizers:
      raise UserError('--int8 needs openvino among --paths')
    batch = self.batches[-1]
    engine = OpenVinoEngine(folder, contract, precision=INT8, batch=batch)
    self._add(engine, self.resizers[beside])


def time_networks(contenders: Contenders, rounds: int) -> list[dict]:
  """Each option by itself (of an exit, its stage): a row per path and batch."""
  contract, jobs = contenders.contract, {}
  names = contract.options.names
  bare = dataclasses.replace(contract, routes=())  # no predictor in these
  for batch in contenders.batches:
    calls = {
      path: costs.calls(contract, classifier.engine, batch)
      for path, classifier in contenders.classifiers.items()
    }
    for path, plain in contenders.plain.items():
      calls[path] = costs.calls(bare, plain, batch)
    for path, rival in contenders.rivals.items():
      calls[path] = {
        name: functools.partial(rival, costs.noise(size_px, batch))
        for name, size_px in zip(names, contract.sizes_px, strict=True)
      }
    for path, parts in calls.items():
      jobs |= {(path, part, batch): job for part, job in parts.items()}
  own = np.asarray(contract.gmacs)
  if contract.options.noun == 'exit':  # what a stage adds to the exit before
    own = np.diff(own, prepend=0)
  gmacs = dict(zip(names, own, strict=True))
  gmacs[PREDICTOR] = contract.predictor_gmacs
  rows = []
  taken = stopwatch.interleaved(
    jobs, rounds, 'networks', least_s=stopwatch.OF_A_NETWORK_S
  )
  for key, seconds in taken.items():
    path, part, batch = key
    ms = stopwatch.ms(seconds, batch)
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


def time_predictions(contenders: Contenders, rounds: int) -> list[dict]:
  """Whole predictions by each policy: a row per path, mode and policy.

  And of OpenVINO one at the most expensive option without anything of ours: its
  network alone, on crops that lie ready.
  """
  subject, contract = contenders.subject, contenders.contract
  option = contract.gmacs.index(contract.costs.full)
  view = contract.views[-1]
  # As large as evaluation resizes to, so that only the crop is left to do.
  whole = dataclasses.replace(view, side_px=view.short_px)
  arrays = [Picture(file, contract).crop(whole) for file in subject.files]
  sources = {
    'single': arrays[:_SINGLES],
    'bulk': arrays,
    'bulk, files': subject.files,
  }
  policies = contenders.policies | {_FULL: policy_lib.fixed(option)}
  jobs = {
    (path, mode, name): Predictions(
      classifier, policy, images, singly=mode == 'single'
    )
    for path, classifier in contenders.classifiers.items()
    for mode, images in sources.items()
    for name, policy in policies.items()
  }
  for path, plain in contenders.plain.items():
    crops = [Picture(array, contract).crop(view) for array in arrays]
    jobs[path, 'single', AS_IT_COMES] = functools.partial(
      plain.singly, option, crops[:_SINGLES]
    )
    jobs[path, 'bulk', AS_IT_COMES] = functools.partial(
      plain.in_bulk(option, contenders.batches[-1]), crops
    )
  taken = stopwatch.interleaved(jobs, rounds, 'predictions')
  rows = []
  for (path, mode, name), seconds in taken.items():
    if name == _FULL:
      continue
    fixed = taken[path.removesuffix(PLAIN), mode, _FULL]
    # What is not ours runs the full option.
    gmacs = getattr(jobs[path, mode, name], 'gmacs', contract.costs.full)
    count = len(sources[mode])
    row = {
      'path': path,
      'mode': mode,
      'policy': name,
      'fixed_ms': stopwatch.ms(fixed, count),
      'policy_ms': stopwatch.ms(seconds, count),
      'gmacs': gmacs,
    }
    implied = contract.costs.full / gmacs
    rows.append(row | stopwatch.speed_up(fixed, seconds, implied))
  return rows


def time_parts(contenders: Contenders, rounds: int) -> list[dict]:
  """Where the time of a single prediction from a file goes.

  Of the first policy. The parts are timed in turn with the whole, and compared
  round by round: this machine may be faster in one round than in the next.
  """
  subject, contract = contenders.subject, contenders.contract
  files, names = subject.files[:_SINGLES], contract.options.names
  policy = next(iter(contenders.policies.values()))
  crop = Picture(files[0], contract).crop(contract.views[-1])[None]
  jobs, runs = {}, {}
  for path, classifier in contenders.classifiers.items():
    jobs[path, 'whole'] = Predictions(classifier, policy, files, singly=True)
    jobs[path, 'decode'] = functools.partial(_decode_all, classifier, files)
    for px, resize in contenders.resizers[path].items():
      jobs[path, px] = lambda resize=resize: np.asarray(resize(crop))
    calls = costs.calls(contract, classifier.engine, 1)
    jobs |= {(path, part): job for part, job in calls.items()}
    answers = Predictions(classifier, policy, files)()
    ran = [name for x in answers for name in x.ran]
    runs[path] = np.array([ran.count(name) for name in names]) / len(files)
  taken = stopwatch.interleaved(jobs, rounds, 'parts')
  ms = {key: 1e3 * seconds for key, seconds in taken.items()}
  rows = []
  for path in contenders.classifiers:
    whole = ms[path, 'whole'] / len(files)
    decode = ms[path, 'decode'] / len(files)
    predictor = to_predictor = np.zeros_like(whole)
    if policy.start is not None:
      predictor = ms[path, PREDICTOR]
      to_predictor = ms[path, subject.trained.model.predictor_px]
    to_sizes = runs[path] @ [ms[path, px] for px in contract.sizes_px]
    network = runs[path] @ [ms[path, name] for name in names]
    parts = {
      'decode': decode,
      'resize': to_predictor + to_sizes,
      'predictor': predictor - to_predictor,
      'network': network - to_sizes,
      'host': whole - decode - predictor - network,
    }
    rows += [
      {
        'path': path,
        'part': part,
        'ms': float(np.median(of_part)),
        'share': float(np.median(of_part / whole)),
      }
      for part, of_part in parts.items()
    ]
  return rows


def time_decoding(contenders: Contenders, rounds: int) -> list[dict]:
  """Decoding files whole, and no larger than needed: a row for each.

  Answers are compared in the exported path: `same_label` and `same_options` are
  shares of the images, `top1` is known where labels are.
  """
  subject = contenders.subject
  files, trained = subject.files, subject.trained
  policy = next(iter(contenders.policies.values()))
  jobs, answers = {}, {}
  for decode in DECODINGS:
    contract = Contract.of(trained, decode=decode)
    with tempfile.TemporaryDirectory() as folder:
      made = programs(trained.in_float32(), contract)
      package.write_onnx(folder, made, fold_norms=True)
      classifier = Classifier(contract, OnnxEngine(folder, contract))
    answers[decode] = Predictions(classifier, policy, files)()
    jobs[decode] = functools.partial(_decode_all, classifier, files)
  rows = []
  taken = stopwatch.interleaved(jobs, rounds, 'decoding')
  for decode, seconds in taken.items():
    pairs = list(zip(answers[decode], answers['full'], strict=True))
    row = {
      'decode': decode,
      'ms_per_image': stopwatch.ms(seconds, len(files)),
      'same_label': float(np.mean([a.label == b.label for a, b in pairs])),
      'same_options': float(np.mean([a.ran == b.ran for a, b in pairs])),
      'top1': '',
    }
    if subject.labels:
      found = [x.label for x in answers[decode]]
      row['top1'] = float(np.mean(np.equal(found, subject.labels)))
    rows.append(row)
  return rows


def _decode_all(classifier: Classifier, files: Sequence[Any]) -> None:
  asked = classifier.schedule(done=None).asked
  for file in files:
    classifier.picture(file).cut(asked)


def _pays(row: dict) -> str:
  named = f'{row["path"]}, {row["mode"]}, {row["policy"]}'
  if abs(row['implied'] - 1) < _SAME:
    return f'{named}: it costs what the full option does; nothing to gain.'
  return (
    f'{named}: it {"pays" if row["realised"] > 1 else "does not pay"}, '
    f'{row["realised"]:.2f} x as fast as the full option '
    f'({row["implied"]:.2f} x implied, {row["realised_of_implied"]:.0%} of it).'
  )


def verdict(worth: list[dict]) -> str:
  """Whether choosing pays on this machine, in a few lines."""
  ours = [row for row in worth if row['policy'] != AS_IT_COMES]
  lines = [_pays(row) for row in ours]
  for mode in dict.fromkeys(row['mode'] for row in ours):
    of_mode = [row for row in ours if row['mode'] == mode]
    best = min(of_mode, key=lambda row: row['policy_ms'])
    lines.append(
      f'Fastest, {mode}: {best["path"]} by {best["policy"]}, '
      f'{best["policy_ms"]:.3g} ms an image, {best["fixed_ms"]:.3g} ms in full.'
    )
  lines += [
    f'{row["path"]}, {row["mode"]}: the full option takes '
    f'{row["policy_ms"]:.3g} ms an image; within this package, cropping and '
    f'queueing included, {row["fixed_ms"] / row["policy_ms"]:.2f} times as '
    'long.'
    for row in worth
    if row['policy'] == AS_IT_COMES
  ]
  return '\n'.join(lines)


def draw(contenders: Contenders, speed: list[dict], path: str) -> None:
  """Figure 3: accuracy (multiply-adds without a record) against latency.

  Of `time_networks`, at batch 1; the files' `path` is without ending.
  """
  contract, record = contenders.contract, contenders.subject.record
  label = 'latency of one image on this machine, ms'
  ms = {
    (row['path'], row['part']): row['ms_per_image']
    for row in speed
    if row['batch'] == 1
  }
  if record is not None:
    router = contract.as_trained if len(contract.routes) > 1 else None
    plots.write({label: latencies.curves(ms, record, router)}, path)
    return
  curves = []
  for name in dict.fromkeys(name for name, _ in ms):
    options = [ms[name, option] for option in contract.options.names]
    if contract.options.noun == 'exit':
      options = np.cumsum(options)
    curves.append(plots.Curve(name, options, contract.gmacs))
  plots.write({label: curves}, path, 'GMACs')
