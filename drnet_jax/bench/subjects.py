# SPDX-License-Identifier: Apache-2.0
"""What an inference benchmark times: a trained run, or a network of no run."""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from drnet_jax import mesh as mesh_lib
from drnet_jax import models
from drnet_jax.choosing import exit_shares
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing.policy import AT_ONCE, Policy
from drnet_jax.choosing.record import Record, signals
from drnet_jax.data.sources import Examples
from drnet_jax.errors import UserError
from drnet_jax.export.contract import Contract
from drnet_jax.models import ranet_network
from drnet_jax.models.drnet import DRNet
from drnet_jax.report import evaluated
from drnet_jax.run import paths, workdir
from drnet_jax.serve.answers import Prediction
from drnet_jax.serve.classifier import Classifier
from drnet_jax.steps.state import Weights

_GO_ON = 1 / 3  # of the images of a cascade of random weights
_COSTS = (0.3, 0.4, 0.6, 0.8)  # of the last exit's, where a network has exits
_STEPS = 40  # of bisection


class Drawn:
  """A start that lets the predictor run and then ignores it.

  Images begin at each position of the path in these shares, in turn and as
  evenly as can be.
  """

  def __init__(self, shares: Sequence[float]):
    self._edges = np.cumsum(shares)
    self._seen = 0

  def __call__(self, log_p: np.ndarray, draw: Any) -> np.ndarray:
    # Multiples of the golden ratio fall evenly into [0, 1).
    turns = (self._seen + np.arange(len(log_p))) * 0.6180339887498949 % 1.0
    self._seen += len(log_p)
    return np.minimum(
      np.searchsorted(self._edges, turns, side='right'), len(self._edges) - 1
    )

  def restart(self) -> None:
    """Begins the same order again."""
    self._seen = 0


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is timed."""

  trained: workdir.Trained
  files: list[Any]  # images, encoded or as arrays
  labels: list[int] | None = None  # None where the images show nothing
  # To time against the most expensive option, by name; {} where they must be
  # set on the images themselves, see `policies_for`.
  policies: Mapping[str, Policy] = dataclasses.field(default_factory=dict)
  record: Record | None = None  # of the test split: for the figure
  shares: Sequence[float] = ()  # of images at each size, with random weights

  @functools.cached_property
  def contract(self) -> Contract:
    """That of the model."""
    return Contract.of(self.trained)


def of_workdir(path: str, images: int, asked: Mapping[str, Any]) -> Subject:
  """The model of a workdir, so many images of its test split, its policies.

  The images are spread over the split, for some are sorted by class. `asked` is
  a policy and a budget, as for `Calibration.find`.
  """
  trained = workdir.load(path, mesh_lib.create(1))
  _, source = workdir.open_split(
    paths.root(path),
    trained.config,
    trained.config.data.test_split,
    trained.class_names,
  )
  some = spread(source.examples, images)
  policies, record = {}, None
  as_trained = asked in ({}, {'policy': 'router'})
  if evaluated.is_evaluated(path) or not as_trained:
    run = evaluated.read(path, **asked)  # says what is missing
    if f'weights {trained.digest}' in run.record.origin:
      record = run.record
      if run.found:
        policies[asked.get('policy', 'best')] = run.found.policy
    elif not as_trained:
      raise UserError(
        f'{path} was evaluated with other weights: python -m drnet_jax.main '
        f'--mode=evaluate --workdir={path}'
      )
  if trained.has_router and as_trained:
    policies['router as trained'] = Contract.of(trained).as_trained
  return Subject(
    trained,
    [example['image'] for example in some],
    [int(example['label']) for example in some],
    policies,
    record,
  )


def spread(examples: Examples, count: int) -> list[dict[str, Any]]:
  """So many examples, or all, evenly: they may be sorted by class."""
  count = min(count, len(examples))
  rows = np.arange(count) * len(examples) // max(count, 1)
  return [examples[i] for i in rows.tolist()]


def of_network(
  network: str, sizes: Sequence[int], shares: Sequence[float], images: int
) -> Subject:
  """A model of random weights by name: a base network, or a RANet."""
  if network in ranet_network.CONFIGURATIONS:
    return _of_ranet(network, images)
  if len(shares) != len(sizes) or abs(sum(shares) - 1) > 1e-6:
    raise UserError(f'shares {shares} are not {len(sizes)} that add up to 1')
  model = drnet(sizes, base={'network': network})
  weights = jax.jit(model.init)(jax.random.key(0))
  resize_px = round(model.image_px * 256 / 224)
  trained = untrained(model, weights, 1000, resize_px=resize_px)
  # All different: of pictures that come again no share is exact.
  files = [_noise_jpeg(seed) for seed in range(images)]
  return Subject(trained, files, shares=shares)


def _of_ranet(name: str, images: int) -> Subject:
  is_cifar = ranet_network.CONFIGURATIONS[name]['stem'] == 'cifar'
  classes = 10 if is_cifar else 1000
  model = ranet({'configuration': name}, 32 if is_cifar else 224, classes)
  trained = untrained(model, model.init(jax.random.key(0)), classes)
  return Subject(trained, pictures(images, model.image_px))


def drnet(sizes: Sequence[int], **changes: Any) -> DRNet:
  """A DRNet like the paper's; `changes` as of `models.create_drnet`."""
  usual = {
    'predictor': {'network': 'resnet10'},
    'predictor_px': 128,
    'image_px': max(sizes),
    'resolutions': sizes,
    'resolution_aware_bn': True,
    'antialias': True,
    'mean': (0.485, 0.456, 0.406),
    'std': (0.229, 0.224, 0.225),
    'num_classes': 1000,
  }
  return models.create_drnet(**usual | changes)


def ranet(
  network: Mapping[str, Any], image_px: int, num_classes: int
) -> models.Model:
  """A RANet; `network` as of `models.create_ranet`."""
  return models.create_ranet(
    network=network,
    image_px=image_px,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    num_classes=num_classes,
  )


def pictures(count: int, side_px: int) -> list[np.ndarray]:
  """Noise of differing brightness, so that networks differ in confidence."""
  rng = np.random.default_rng(0)
  low = rng.integers(0, 200, (count, 1, 1, 3))
  noise = rng.integers(0, 56, (count, side_px, side_px, 3))
  return list((low + noise).astype(np.uint8))


def untrained(
  model: models.Model, weights: Weights, classes: int, *, resize_px: int = 0
) -> workdir.Trained:
  """A model of random weights, as if a run had left it."""
  data = {'resize_px': resize_px, 'keep_aspect': True}
  return workdir.Trained(
    model,
    *weights,
    has_router=isinstance(model, DRNet),
    class_names=tuple(map(str, range(classes))),
    config=ml_collections.ConfigDict({'data': data}),
    origin='random weights',
  )


@dataclasses.dataclass
class Predictions:
  """Images run by a policy: called, a job for the stopwatch."""

  classifier: Classifier
  policy: Policy
  images: Sequence[Any]
  singly: bool = False  # each image in a call of its own
  gmacs: float = np.nan  # of an image on average, once they have been run

  def __call__(self) -> list[Prediction]:
    if isinstance(self.policy.start, Drawn):
      self.policy.start.restart()
    self.classifier.policy = self.policy
    calls = [[image] for image in self.images] if self.singly else [self.images]
    answers = [x for call in calls for x in self.classifier.predict(call)]
    self.gmacs = float(np.mean([x.gmacs for x in answers]))
    return answers


def policies_for(subject: Subject, classifier: Classifier) -> dict[str, Policy]:
  """The policies to time; thresholds without a run fit the timed images.

  Only so is a share of images, or a cost, what it is to be.
  """
  if subject.policies:
    return dict(subject.policies)
  contract, options = subject.contract, len(subject.contract.options)
  if options < 2:
    raise UserError('there is only one option: nothing can choose')
  sure = _confidence(classifier, subject.files)
  if contract.options.noun == 'exit':
    full = contract.costs.full
    return {
      f'{share:.0%} of the cost': _exits_at(sure, contract, share * full)
      for share in _COSTS
    }
  ends = (0, options - 1)
  limits = exit_shares.thresholds(sure[:, ends], (1 - _GO_ON, _GO_ON))
  cascade = Policy(ends, None, tuple(limits.tolist()), signal='probability')
  policies = {'cascade, a third goes on': cascade}
  if subject.shares:
    every = tuple(range(options))
    stop = (AT_ONCE,) * (options - 1)
    policies = {'routed': Policy(every, Drawn(subject.shares), stop)} | policies
  return policies


def _confidence(classifier: Classifier, files: Sequence[Any]) -> np.ndarray:
  """Largest probability at every option, [N, R]."""
  found = []
  for j in range(len(classifier.contract.options)):
    answers = Predictions(classifier, policy_lib.fixed(j), files)()
    found.append(signals(np.stack([x.probabilities for x in answers]))[0])
  return np.stack(found, 1)


def _exits_at(sure: np.ndarray, contract: Contract, gmacs: float) -> Policy:
  """Thresholds by the rule of shares, within an average cost."""
  table, low, high = np.asarray(contract.gmacs), -12.0, 12.0
  every = tuple(range(len(table)))
  found = Policy(every, None, (AT_ONCE,) * (len(every) - 1))
  for _ in range(_STEPS):
    middle = (low + high) / 2
    shares = exit_shares.geometric_shares(np.exp(middle), len(table))
    limits = exit_shares.thresholds(sure, shares)
    left_at = (sure >= np.append(limits, -np.inf)).argmax(1)
    if table[left_at].mean() <= gmacs:
      low = middle
      found = Policy(every, None, tuple(limits.tolist()), signal='probability')
    else:
      high = middle
  return found


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
