# SPDX-License-Identifier: Apache-2.0
"""Inference: every image runs as far as its policy takes it, and no further.

classifier = Classifier.load('runs/quickstart')
classifier.predict(['photo.jpg'])[0].name             # one: least latency
classifier.predict(glob.glob('album/*'))              # many: throughput
classifier.set_budget(gmacs=0.005)                    # the best policy for it
classifier.set_budget(gmacs=0.005, policy='router')   # or of one family
with classifier.stream(deadline_ms=50) as stream:     # as they arrive
  future = stream.submit(data)
Classifier.load(['runs/small', 'runs/large'])         # a ladder of networks
"""

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from drnet_jax.choosing import calibration as calibration_lib
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.search import Point
from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract, is_export
from drnet_jax.run import ladder, paths
from drnet_jax.serve import loading
from drnet_jax.serve.answers import Failure, Prediction, failure, predictions
from drnet_jax.serve.choice import How
from drnet_jax.serve.engines import Engine, cores
from drnet_jax.serve.loading import Loaded
from drnet_jax.serve.picture import Picture
from drnet_jax.serve.schedule import Item, Schedule
from drnet_jax.serve.streaming import Stream

if TYPE_CHECKING:
  from drnet_jax.run import workdir

_AHEAD_BATCHES = 4  # that are read ahead
_TURNS = 4  # of each thread at these, so that none waits long for another


@dataclasses.dataclass(eq=False, repr=False)
class Classifier:
  """A trained model, or a ladder of several, ready to classify.

  Attributes:
    policy: that images follow. What `Calibration.find` gives without a budget;
      without a calibration the router as trained, or else the most expensive
      option; of an exported folder the one it was exported with. Set it by
      `set_budget`, `set_option`, or to any `choosing.policy.Policy`.
  """

  contract: Contract
  engine: Engine
  calibration: Calibration | None = None  # for `set_budget`
  # Each reads one of the models, for `export`.
  members: 'Sequence[Callable[[], workdir.Trained]]' = ()
  runtime: str = ''  # a line about what runs it, for people

  def __post_init__(self):
    found, contract = self.calibration, self.contract
    if found and found.options != contract.options:
      raise UserError(
        f'the calibration is of {", ".join(found.options.names)}, the model '
        f'has {", ".join(contract.options.names)}: calibrate again'
      )
    self.runtime = self.runtime or self.engine.name
    self.policy: Policy = found.find().policy if found else contract.as_trained

  @classmethod
  def load(
    cls,
    path: str | Sequence[str],
    *,
    runtime: str = 'auto',
    precision: str = 'auto',
    decode: str | None = None,
    batch: int = 0,
  ) -> 'Classifier':
    """Reads a model and makes it ready.

    XLA compiles nothing after this; OpenVINO a size when it is first run.

    Args:
      path: workdir of a run (its latest weights), one of its checkpoints
        (`<workdir>/checkpoints/<stage>/<step>`), a folder that `export` wrote,
        or several workdirs: a ladder, the cheapest network first. A ladder that
        was calibrated has a folder, too.
      runtime: 'jax'; 'onnx' or 'openvino', which are faster on CPUs (graphs of
        a workdir are written to the cache); 'auto': JAX on accelerators and for
        networks with exits, on CPUs the fastest of what is installed and gives
        JAX's answers, tried once on this machine (see `choice`); 'stablehlo',
        the exported programs, for checking them.
      precision: that OpenVINO computes in: 'f32', 'bf16', 'f16', or 'auto', the
        fastest that the processor has and that changes the answers little.
      decode: see `Contract`; default 'full', or what a folder was exported
        for.
      batch: images that are run at once where there are many; 0 for what suits
        the device.

    Raises:
      UserError: no model, or a runtime that is not installed.
    """
    how = How(runtime, precision, batch, decode)
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    calibration = None
    if isinstance(path, str):
      calibration = calibration_lib.read(paths.root(path))
    if not isinstance(path, str) or ladder.is_ladder(path):
      runs = ladder.members(path)
      loaded = loading.joined(
        {name: loading.of_run(run, how) for name, run in runs.items()}
      )
    elif is_export(path):
      loaded = loading.of_folder(path, how)
    else:
      loaded = loading.of_run(path, how)
    if calibration and not all(x in calibration.origin for x in loaded.digests):
      calibration = None  # of other weights; `calibrate` makes it anew
    return cls._of(loaded, calibration)

  @classmethod
  def of(
    cls,
    trained: 'workdir.Trained',
    *,
    calibration: Calibration | None = None,
    runtime: str = 'auto',
    precision: str = 'auto',
    decode: str | None = None,
    batch: int = 0,
  ) -> 'Classifier':
    """As `load`, of a model that is in memory.

    Args:
      trained: the model.
      calibration: of its weights; None for fixed options, or the router alone.
      runtime, precision, decode, batch: as of `load`.

    Raises:
      UserError: weights that are not finite.
    """
    from drnet_jax.serve import compiled

    how = How(runtime, precision, batch, decode)
    return cls._of(compiled.of_trained(trained, how), calibration)

  @classmethod
  def of_ladder(
    cls,
    members: 'dict[str, workdir.Trained]',
    *,
    calibration: Calibration | None = None,
    runtime: str = 'auto',
    precision: str = 'auto',
    decode: str | None = None,
    batch: int = 0,
  ) -> 'Classifier':
    """As `of`, of several models by their names, the cheapest first."""
    from drnet_jax.serve import compiled

    how = How(runtime, precision, batch, decode)
    parts = {k: compiled.of_trained(x, how) for k, x in members.items()}
    return cls._of(loading.joined(parts), calibration)

  @classmethod
  def _of(cls, one: Loaded, calibration: Calibration | None) -> 'Classifier':
    made = cls(one.contract, one.engine, calibration, one.members, one.runtime)
    made.policy = one.policy or made.policy
    return made

  def set_budget(
    self,
    *,
    policy: str = 'best',
    gmacs: float | None = None,
    ms: float | None = None,
    accuracy: float | None = None,
  ) -> Point:
    """Follows the best policy of a family within a budget from now on.

    Args:
      policy: 'best', or 'fixed', 'router', 'cascade', 'routed_cascade'.
      gmacs: average cost of an image in 1e9 multiply-adds, everything counted.
      ms: the same in milliseconds, as `calibrate --measure` timed this machine.
      accuracy: top-1 in [0, 1] on the calibration images, at the least cost.
        Without any of the three see `Calibration.find`.

    Returns:
      What the calibration images promise.

    Raises:
      UserError: not calibrated, or out of reach.
    """
    if self.calibration is None:
      raise UserError(
        'not calibrated for these weights: python -m drnet_jax calibrate '
        '--workdir=...'
      )
    point = self.calibration.find(
      policy=policy, gmacs=gmacs, ms=ms, accuracy=accuracy
    )
    self.policy = point.policy
    return point

  def set_option(self, name: str) -> None:
    """Runs every image at one option from now on: '112 px', or 'exit 3'."""
    names = self.contract.options.names
    if name not in names:
      raise UserError(f'{name!r} is not one of {", ".join(names)}')
    self.policy = policy_lib.fixed(names.index(name))

  def set_size(self, size_px: int) -> None:
    """Runs every image at one size from now on."""
    self.set_option(f'{size_px} px')

  def set_exit(self, exit_number: int) -> None:
    """Lets every image leave at one exit from now on, numbered from 1."""
    self.set_option(f'exit {exit_number}')

  def predict(
    self, images: Iterable[Any], *, top_k: int = 5, on_error: str = 'raise'
  ) -> list[Prediction | Failure]:
    """Classifies images, each by the policy.

    Images that come to the same option wait for each other until a batch is
    full. Files are decoded meanwhile. A single image runs at once, in programs
    for a batch of one.

    Args:
      images: paths, bytes, PIL images or arrays, see `Picture`, or what
        `picture` made of one. A generator will do: twice four batches, and
        what waits for an option, are held in memory.
      top_k: classes in an answer's `top`.
      on_error: 'raise' a UserError that names the images that cannot be read,
        or 'return' a `Failure` in the place of each.

    Returns:
      One answer each, in order.
    """
    if isinstance(images, str | bytes | os.PathLike):
      raise UserError('predict takes several images: [image] for one')
    if on_error not in ('raise', 'return'):
      raise ValueError(f'{on_error=} is neither raise nor return')
    found: dict[int, Prediction | Failure] = {}

    def done(items: list[Item], probabilities: np.ndarray) -> None:
      answers = predictions(self.contract, items, probabilities, top_k)
      found.update(zip((item.key for item in items), answers, strict=True))

    def read(i: int, source: Any) -> Item | None:
      item = Item(i, self.picture(source))
      try:
        item.picture.cut(schedule.asked)
      except Exception as error:  # a decoder may raise anything on rubbish
        found[i] = failure(i, source, error)
        return None
      return item

    schedule = self.schedule(done=done)
    count = _AHEAD_BATCHES * self.engine.best_batch
    for items, alone in _ahead(read, images, count):
      schedule.admit(items, alone=alone)
      schedule.work()
    schedule.drain()
    answers = [found[i] for i in range(len(found))]
    reasons = [x.reason for x in answers if isinstance(x, Failure)]
    if reasons and on_error == 'raise':
      raise UserError('\n       '.join(reasons))
    return answers

  def stream(
    self, *, deadline_ms: float, batch: int = 0, top_k: int = 5
  ) -> Stream:
    """Classifies images as they arrive; see `Stream`."""
    return Stream(self, deadline_ms=deadline_ms, batch=batch, top_k=top_k)

  def export(
    self, folder: str, *, formats: Sequence[str], weights: str = 'folded'
  ) -> None:
    """Writes a folder for other programs, with this policy as the usual one.

    Args: see `package.write`.

    Raises:
      UserError: a network with exits, or a folder that holds something else.
    """
    from drnet_jax.export import model_card, package
    from drnet_jax.export.programs import of_ladder

    if not self.members:
      raise UserError('this was exported: export the run it came from again')
    decode = self.contract.decode
    trained = [member().in_float32() for member in self.members]
    members = [(x, Contract.of(x, decode=decode)) for x in trained]
    package.write(
      folder,
      programs=of_ladder(members, self.contract),
      contract=self.contract,
      calibration=self.calibration,
      usual=self.policy,
      about=[model_card.about(*member) for member in members],
      formats=formats,
      weights=weights,
    )

  def picture(self, source: Any) -> Picture:
    """An image, to be decoded as this model needs it; once if handed on."""
    if isinstance(source, Picture):
      return source
    return Picture(source, self.contract)

  def schedule(
    self, *, done: Callable[[list[Item], np.ndarray], None]
  ) -> Schedule:
    """A schedule of the policy as it is now; see there."""
    batch = self.engine.best_batch
    return Schedule(self.engine, self.contract, self.policy, batch, done)


def _ahead(
  read: Callable[[int, Any], Item | None], images: Iterable[Any], count: int
) -> Iterator[tuple[list[Item], bool]]:
  """Images as they are read, so many at a time, the next ones meanwhile.

  Yields:
    Those that could be read, and whether there is but one image in all.
  """
  sources = enumerate(images)
  first = list(itertools.islice(sources, 2))
  if len(first) < 2:
    # Nothing to overlap: no threads.
    yield [item for one in first if (item := read(*one))], True
    return
  sources = itertools.chain(first, sources)

  def read_all(some) -> list[Item | None]:
    return [read(*one) for one in some]

  with concurrent.futures.ThreadPoolExecutor(cores()) as threads:

    def begin():
      some = list(itertools.islice(sources, count))
      # A thread takes several at once: to hand over one costs as much as to
      # read an array.
      each = max(len(some) // (_TURNS * cores()), 1)
      return [
        threads.submit(read_all, some[i : i + each])
        for i in range(0, len(some), each)
      ]

    reading = begin()
    while reading:
      following = begin()
      yield [x for part in reading for x in part.result() if x], False
      reading = following
