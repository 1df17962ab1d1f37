# SPDX-License-Identifier: Apache-2.0
"""A trained model as a folder that other programs can run.

contract.json      how images become inputs, costs, class names, policies
predictor.onnx     uint8 [batch, S, S, 3] -> log p of the sizes
r112.onnx, ...     uint8 [batch, S, S, 3] -> probabilities, a file per size
weights.bin        of all ONNX files; equal arrays are stored once
*.stablehlo        the same programs for JAX, on CPU, GPU and TPU
weights.npz        of the StableHLO programs, where sizes share them
calibration.json   for `Classifier.set_budget`
run.py             runs the ONNX files without JAX, and what it imports
README.md          the model card
"""

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from drnet_jax import settings
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.policy import Dial, Policy
from drnet_jax.choosing.search import Point
from drnet_jax.errors import UserError
from drnet_jax.export import FORMATS, WEIGHTS, model_card
from drnet_jax.export.contract import FILE, PREDICTOR, Contract
from drnet_jax.export.programs import Program

_PLATFORMS = ('cpu', 'cuda', 'tpu')
_ALIGNMENT = 64  # bytes, for runtimes that map the file
_INLINE_BYTES = 1024  # smaller arrays stay in the graph
STABLEHLO_WEIGHTS = 'weights.npz'


def write(
  folder: str,
  *,
  programs: Mapping[str, Program],
  contract: Contract,
  calibration: Calibration | None,
  usual: Policy,
  about: Sequence[str],
  formats: Sequence[str],
  weights: str,
) -> None:
  """Writes the folder.

  Args:
    folder: made if it is not there.
    programs: by name, see `export.programs`.
    contract: of them.
    calibration: for the policies; None for the usual one alone.
    usual: the policy that is followed unless another is asked for.
    about: what the model card says of each network.
    formats: of FORMATS.
    weights: 'folded': every program holds its own, in ONNX with the norms put
      into the convolutions. 'shared': all sizes use the same convolutions,
      with their norms behind them.

  Raises:
    UserError: something cannot be exported, or a package is missing.
  """
  for value, allowed in ((weights, WEIGHTS), *((f, FORMATS) for f in formats)):
    if value not in allowed:
      raise UserError(f'{value!r} is not one of {allowed}')
  if not formats:
    raise UserError(f'no format to export to; there are {FORMATS}')
  if not isinstance(usual.start, Dial | None):
    raise UserError(
      'a policy with a start of its own cannot be exported: set another first, '
      'by set_budget or set_option'
    )
  with _replaced(folder) as partial:
    if 'onnx' in formats:
      write_onnx(partial, programs, fold_norms=weights == 'folded')
      _write_runtime(partial)
    shared = {}
    if 'stablehlo' in formats:
      shared = write_stablehlo(partial, programs, share=weights == 'shared')
    policies = [_row('usual', usual, kept=True)]
    if calibration is not None:
      calibration.write(partial)
      for family, points in calibration.points['GMACs'].items():
        policies += [_row(family, point.policy, point) for point in points]
      for family, point in calibration.kept.items():
        policies.append(_row(family, point.policy, point, kept=True))
    fields = contract.to_json() | {
      'format': 2,
      'formats': list(formats),
      'weights': weights,
      'stablehlo_weights': shared,
      'input': 'images: uint8 [batch, side, side, 3], RGB',
      'policies': policies,
    }
    settings.write_json(os.path.join(partial, FILE), fields)
    card = model_card.text(
      contract, calibration, usual, about, formats, weights
    )
    with open(os.path.join(partial, 'README.md'), 'w') as file:
      file.write(card)


@contextlib.contextmanager
def _replaced(folder: str) -> Iterator[str]:
  """A folder to write in, which then takes the place of one of this name.

  So that it is never half of one export and half of another.

  Raises:
    UserError: it cannot be written, or is neither empty nor an export.
  """
  target = os.path.realpath(folder)  # of '' the working directory
  try:
    if os.path.isdir(target):
      there = os.listdir(target)
      if there and (FILE not in there or 'checkpoints' in there):
        raise UserError(
          f'{target} is not an export and not empty; name a new folder'
        )
    elif os.path.exists(target):
      raise UserError(f'{target} is a file; name a folder to write')
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = tempfile.mkdtemp(dir=os.path.dirname(target))
    try:
      yield partial
      os.chmod(partial, 0o755)
      with tempfile.TemporaryDirectory(
        dir=os.path.dirname(target), ignore_cleanup_errors=True
      ) as aside:
        before = os.path.join(aside, 'before')
        if os.path.isdir(target):
          os.replace(target, before)
        try:
          os.replace(partial, target)
        except OSError:
          if os.path.isdir(before):
            os.replace(before, target)
          raise
    finally:
      shutil.rmtree(partial, ignore_errors=True)
  except OSError as error:
    raise UserError(f'cannot write {folder}: {error}') from error


def _write_runtime(folder: str) -> None:
  """Writes `run.py` and what it imports, none of which needs this package."""
  package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  for name, source in (
    ('run.py', ('export', 'standalone.py')),
    ('transforms.py', ('data', 'transforms.py')),
    ('pixels.py', ('data', 'pixels.py')),
  ):
    with open(os.path.join(package, *source), encoding='utf-8') as file:
      text = file.read()
    text = text.replace(
      'from drnet_jax.errors import UserError\n',
      'class UserError(Exception):\n  """What is wrong, and a remedy."""\n',
    )
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
      file.write(text)


def _row(
  family: str, policy: Policy, point: Point | None = None, kept: bool = False
) -> dict[str, Any]:
  """A policy for `run.py`, with what it gives on the calibration images.

  `kept`: it is followed where no budget is given.
  """
  promise = {name: getattr(point, name, None) for name in ('gmacs', 'top1')}
  # Signals lie between 0 and 1, and JSON knows no infinity.
  stop = np.clip(policy.stop, -1, 2).tolist()
  row = {'family': family, 'kept': kept} | promise
  return row | policy.to_json() | {'stop': stop}


def write_onnx(
  folder: str, programs: Mapping[str, Program], *, fold_norms: bool
) -> None:
  """Writes programs and their `weights.bin`; needs the package `onnx`."""
  try:
    import onnx
    from onnx import external_data_helper

    from drnet_jax.export import onnx_graph
  except ImportError as error:
    raise UserError(
      "exporting ONNX needs onnx: pip install 'drnet_jax[export]'"
    ) from error
  places: dict[bytes, tuple[int, int]] = {}  # of arrays, by their content
  with open(os.path.join(folder, 'weights.bin'), 'wb') as file:
    for name, (program, weights, side_px) in programs.items():
      model = onnx_graph.convert(
        functools.partial(program, weights),
        jax.ShapeDtypeStruct((side_px, side_px, 3), np.uint8),
        output_name='log_p' if name == PREDICTOR else 'probabilities',
        fold_norms=fold_norms,
      )
      for tensor in model.graph.initializer:
        data = tensor.raw_data
        if len(data) < _INLINE_BYTES:
          continue
        key = hashlib.sha256(data).digest()
        if key not in places:
          file.write(b'\0' * (-file.tell() % _ALIGNMENT))
          places[key] = file.tell(), len(data)
          file.write(data)
        offset, length = places[key]
        external_data_helper.set_external_data(
          tensor, 'weights.bin', offset=offset, length=length
        )
        tensor.ClearField('raw_data')
      onnx.save_model(model, os.path.join(folder, f'{name}.onnx'))


def write_stablehlo(
  folder: str, programs: Mapping[str, Program], *, share: bool
) -> dict[str, list[str]]:
  """Writes programs; with `share` their weights are arguments.

  Returns:
    For each program, what its arguments are called in `weights.npz`.
  """
  arrays: dict[str, np.ndarray] = {}
  names: dict[str, list[str]] = {}
  for name, (program, weights, side_px) in programs.items():
    # Not bound to the devices that the weights happen to lie on.
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, weights))

    def run(leaves, images, program=program, tree=tree):
      return program(jax.tree.unflatten(tree, leaves), images)

    if share:
      names[name] = [
        hashlib.sha256(x.tobytes() + str(x.shape).encode()).hexdigest()
        for x in leaves
      ]
      arrays |= zip(names[name], leaves, strict=True)
      data = _stablehlo(run, side_px, leaves)
    else:
      data = _stablehlo(functools.partial(run, leaves), side_px)
    with open(os.path.join(folder, f'{name}.stablehlo'), 'wb') as file:
      file.write(data)
  if share:
    np.savez(os.path.join(folder, STABLEHLO_WEIGHTS), **arrays)
  return names


def _stablehlo(program: Callable, side_px: int, *arguments: Any) -> bytes:
  """A function of (*arguments, images) for any batch and platform."""
  (batch,) = jax.export.symbolic_shape('batch')
  images = jax.ShapeDtypeStruct((batch, side_px, side_px, 3), np.uint8)
  exported = jax.export.export(jax.jit(program), platforms=_PLATFORMS)(
    *arguments, images
  )
  try:
    return exported.serialize()
  except ImportError as error:
    raise UserError(
      "exporting StableHLO needs flatbuffers: pip install 'drnet_jax[export]'"
    ) from error
