# SPDX-License-Identifier: Apache-2.0
"""Which runtime suits a model on this machine: tried once, then remembered.

Every runtime that is installed runs every option on a few images. Those whose
answers are not the reference's are out; of the others the fastest is chosen.
The reference is JAX, or, of a folder that was exported without it, the first of
what is there.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from drnet_jax import cache
from drnet_jax.errors import UserError
from drnet_jax.export import PRECISIONS, RUNTIMES
from drnet_jax.export.contract import Contract, read_fields
from drnet_jax.serve import openvino
from drnet_jax.serve.engines import (
  INT8,
  Engine,
  OnnxEngine,
  cores,
  full_name,
)

# How far a probability may be from the reference's, in float32 that of any
# picture. In half precision the third digit is rounded, dozens of layers add
# that up, and where two classes are level they move far: there the pictures'
# largest differences are averaged, lest one picture decide.
# Runtimes round int8 so differently that only what is broken can be told.
TOLERANCE = {'f32': 1e-4, 'bf16': 0.03, 'f16': 0.03, INT8: 0.3}
MODULES = {'onnx': 'onnxruntime', 'openvino': 'openvino'}
BATCH = 8  # that is timed where none is asked for
_PICTURES = 16  # whose answers are compared
_ROUNDS, _SECONDS = 5, 3.0  # whichever comes first
# What else the time of a call may depend on.
_PACKAGES = ('jax', 'jaxlib', 'onnxruntime', 'openvino', 'libtpu')
_PLUGINS = ('jax-cuda12-plugin', 'jax-cuda13-plugin', 'jax-rocm7-plugin')
_DEVICES = ('/dev/nvidia0', '/dev/kfd', '/dev/accel0', '/dev/vfio/0')
# By which JAX is kept from some of these.
_HIDE = (
  'JAX_PLATFORMS',
  'JAX_PLATFORM_NAME',
  'CUDA_VISIBLE_DEVICES',
  'HIP_VISIBLE_DEVICES',
  'ROCR_VISIBLE_DEVICES',
)


@dataclasses.dataclass(frozen=True)
class How:
  """How a model is to be run, as it was asked for; see `Classifier.load`.

  Raises:
    UserError: there is no such runtime, or no such precision in it.
  """

  runtime: str = 'auto'
  precision: str = 'auto'
  batch: int = 0
  decode: str | None = None

  def __post_init__(self):
    for field, known in (('runtime', RUNTIMES), ('precision', PRECISIONS)):
      value = getattr(self, field)
      if value not in known:
        raise UserError(f'{field} = {value!r} is not one of {known}')
    if self.is_halved and self.runtime not in ('auto', 'openvino'):
      raise UserError(
        f"precision = {self.precision!r} needs runtime='openvino'; "
        f'{self.runtime} does not have it'
      )

  @property
  def is_halved(self) -> bool:
    """Whether half precision is a must: only OpenVINO has that."""
    return self.precision not in ('auto', 'f32')

  @property
  def is_beside_jax(self) -> bool:
    """Whether JAX is one of the candidates, where there are weights for it."""
    return self.runtime == 'auto' and not self.is_halved

  @property
  def mode(self) -> str:
    """What is timed: images by themselves, or many of them."""
    return 'one at a time' if self.batch == 1 else 'in bulk'


class Choice(NamedTuple):
  """A runtime and a precision, neither of them 'auto', and why, for people."""

  runtime: str
  precision: str
  said: str


def is_installed(module: str) -> bool:
  """Whether a module could be imported."""
  return importlib.util.find_spec(module) is not None


def candidates(how: How) -> list[tuple[str, str]]:
  """Runtimes of exported graphs to try, with their precisions.

  Of 'auto' all that are installed; OpenVINO in 'auto' precision may be two.
  """

  def is_tried(runtime: str) -> bool:
    is_any = how.runtime == 'auto' and is_installed(MODULES[runtime])
    return how.runtime == runtime or is_any

  found = []
  if is_tried('onnx') and not how.is_halved:
    found.append(('onnx', 'f32'))
  if is_tried('openvino'):
    some = [how.precision]
    if how.precision == 'auto':
      try:
        some = openvino.precisions(_abilities())
      except Exception:  # whatever its import raises; `choose` leaves it out
        if how.runtime == 'openvino':
          raise
        some = ['f32']
    found += [('openvino', precision) for precision in some]
  if not found and how.is_halved:
    raise UserError(
      f'precision = {how.precision!r} needs OpenVINO: pip install '
      "'drnet_jax[openvino]'"
    )
  return found


def _abilities() -> list[str]:
  """Of this processor; OpenVINO takes a while to import."""
  key = cache.key(machine())
  found = cache.read_json('abilities', key)
  if found is None:
    found = openvino.abilities()
    cache.write_json('abilities', key, found)
  return found


def exported_engine(
  runtime: str, precision: str, folder: str, contract: Contract, batch: int
) -> Engine:
  """Runs what was exported to a folder."""
  fields = read_fields(folder)
  if runtime == 'stablehlo':
    from drnet_jax.serve import compiled

    shared = fields['stablehlo_weights']
    return compiled.exported(folder, contract, shared, batch)
  if runtime == 'onnx':
    return OnnxEngine(folder, contract, batch=batch)
  share = fields.get('weights') == 'shared' and precision != INT8
  return openvino.OpenVinoEngine(
    folder, contract, precision=precision, batch=batch, share=share
  )


def remembered(
  model: str, how: How, tried: Iterable[tuple[str, str]]
) -> Choice | None:
  """What was chosen before for a model, by the key of its graphs."""
  found = cache.read_json('choices', _key(model, how, tried))
  return Choice(**found) if found else None


def choose(
  model: str,
  how: How,
  tried: Mapping[tuple[str, str], Callable[[], Engine]],
  contract: Contract,
) -> Choice:
  """Tries runtimes; remembers the fastest that agrees with the first of them.

  Raises:
    UserError: the reference returns NaN or infinity.
  """
  batch = how.batch or BATCH
  engines, answers, out = {}, {}, []
  for key, make in tried.items():
    try:
      made = make()
      answers[key] = _answers(made, contract, batch)
      engines[key] = made
    except Exception as error:  # whatever a runtime raises on what it lacks
      # JAX lacks nothing; of the others one is enough.
      if key[0] == 'jax' or len(out) + 1 == len(tried):
        raise
      why = ' '.join(str(error).split())[:200]
      out.append(f'{full_name(*key)} is left out: {why}')
  reference = next(iter(answers))
  apart = {
    key: _apart(key[1], found, answers[reference])
    for key, found in answers.items()
  }
  if np.isnan(apart[reference]):
    raise UserError('the network returns NaN or infinity')
  good = {k: e for k, e in engines.items() if apart[k] <= TOLERANCE[k[1]]}
  out += [
    f'{full_name(*key)} is left out: a probability is {apart[key]:.1g} off'
    for key in engines
    if key not in good
  ]
  ms = _time(good, contract, batch)
  ranked = sorted(ms, key=ms.get)
  times = ', '.join(f'{full_name(*key)} {ms[key]:.3g} ms' for key in ranked)
  said = (
    f'{full_name(*ranked[0])}, the fastest here {how.mode} (all options of an '
    f'image: {"; ".join([times, *out])})'
  )
  choice = Choice(*ranked[0], said)
  if not (any(runtime == 'jax' for runtime, _ in tried) and _expects_device()):
    cache.write_json('choices', _key(model, how, tried), choice._asdict())
  return choice


def _answers(
  engine: Engine, contract: Contract, batch: int
) -> list[np.ndarray]:
  """Probabilities of the pictures, [N, K]: the predictor's, every option's."""
  answers = []
  for call, side_px in _calls(engine, contract):
    images = _pictures(side_px, _PICTURES)
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    results = [np.asarray(call(part))[: len(part)] for part in parts]
    answers.append(np.concatenate(results))
  if contract.routes:
    answers[0] = np.exp(answers[0])
  return answers


def _apart(
  precision: str, answers: list[np.ndarray], reference: list[np.ndarray]
) -> float:
  """How far probabilities are apart, for `TOLERANCE`; NaN where one is."""
  largest = [
    np.abs(found - true).max(1)
    for found, true in zip(answers, reference, strict=True)
  ]
  typical = np.mean if precision in ('bf16', 'f16') else np.max
  return float(np.max([typical(of_pictures) for of_pictures in largest]))


def _time(
  engines: Mapping[Any, Engine], contract: Contract, batch: int
) -> dict[Any, float]:
  """Milliseconds of an image at all options: medians, measured in turn."""
  jobs = [
    (key, call, _pictures(side_px, batch), [])
    for key, engine in engines.items()
    for call, side_px in _calls(engine, contract)
  ]
  begin = time.perf_counter()
  for i in range(_ROUNDS):
    if i and time.perf_counter() - begin > _SECONDS:
      break
    for key, call, images, seconds in jobs:
      # As many batches as it would have in hand.
      count = 1 if batch == 1 else engines[key].in_flight
      start = time.perf_counter()
      for result in [call(images) for _ in range(count)]:
        np.asarray(result)
      seconds.append((time.perf_counter() - start) / count)
  ms = dict.fromkeys(engines, 0.0)
  for key, _, _, seconds in jobs:
    ms[key] += 1e3 * float(np.median(seconds)) / batch
  return ms


def _calls(
  engine: Engine, contract: Contract
) -> list[tuple[Callable[[np.ndarray], Any], int]]:
  """Functions of images, and the side of these: the predictor, the options."""
  calls = []
  if contract.routes:
    calls.append((engine.log_p, contract.predictor_view.side_px))
  for j, view in enumerate(contract.views):
    calls.append((lambda x, j=j: engine.run(j, x)[0], view.side_px))
  return calls


def _pictures(side_px: int, count: int) -> np.ndarray:
  """Pictures of differing brightness, contrast and detail."""
  rng = np.random.default_rng(0)
  coarse = rng.uniform(0, 255, (count, 4, 4, 3))
  spread = np.arange(side_px) * 4 // side_px
  smooth = coarse[:, spread][:, :, spread]
  noise = rng.normal(0, 1, (count, side_px, side_px, 3))
  contrast = rng.uniform(2, 60, (count, 1, 1, 1))
  return (smooth + contrast * noise).clip(0, 255).astype(np.uint8)


def _key(model: str, how: How, tried: Iterable[tuple[str, str]]) -> str:
  return cache.key(model, how.mode, sorted(tried), machine())


@functools.cache
def machine() -> list[Any]:
  """What times depend on; JAX is not asked, it takes too long to import."""
  versions = {}
  for package in (*_PACKAGES, *_PLUGINS):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return [
    platform.node(),
    _processor(),
    cores(),
    versions,
    _devices(),
    _hidden(),
    cache.code(),
  ]


def _devices() -> list[str]:
  return [device for device in _DEVICES if os.path.exists(device)]


def _hidden() -> dict[str, str]:
  return {name: os.environ[name] for name in _HIDE if name in os.environ}


def _expects_device() -> bool:
  """Whether JAX would run on an accelerator, if that could be reached.

  Where it runs on the processor all the same, the next process may do better.
  """
  plugins = [name.replace('-', '_') for name in _PLUGINS] + ['libtpu']
  is_hidden = any(x in ('', '-1', 'cpu') for x in _hidden().values())
  return bool(_devices()) and not is_hidden and any(map(is_installed, plugins))


def _processor() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      lines = [x for x in file if x.startswith(('model name', 'flags'))]
  except OSError:
    return platform.processor()
  return ''.join(dict.fromkeys(lines))
