# SPDX-License-Identifier: Apache-2.0
"""What early exit is worth here: part of `drnet_jax benchmark`.

    python -m drnet_jax benchmark --workdir=runs/ranet_tiny
    python -m drnet_jax benchmark --network=cifar_tiny --out=runs/speed

With a workdir: its model and its test images. With the name of a configuration:
random weights and noise; images differ enough in confidence to be told apart,
and thresholds are set on the very images, so that a budget is met.

Times, in turn, medians of the rounds: every stage by itself; and whole
predictions at shares of the full cost, against every image at the last exit,
in bulk and one at a time. `implied` is the ratio of multiply-adds, `realised`
that of times. Leaves `exit_stages.csv` and `exit_worth.csv`.
"""

import csv
import functools
import os
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from drnet_jax import mesh as mesh_lib
from drnet_jax import models, settings, terminal
from drnet_jax.bench import costs
from drnet_jax.bench.stopwatch import interleaved
from drnet_jax.data.pipeline import Data
from drnet_jax.export.contract import Contract
from drnet_jax.models import ranet_network
from drnet_jax.models.ranet import RANet
from drnet_jax.run import workdir
from drnet_jax.serve.budget import Costs
from drnet_jax.serve.early_exit import EarlyExitClassifier
from drnet_jax.serve.exit_budget import ExitCalibration
from drnet_jax.serve.stages import StageEngine

_SHARES = (0.3, 0.4, 0.6, 0.8)  # of the full cost
_SINGLES = 40


def subject(path: str, network: str) -> workdir.Trained | None:
  """The model to time, if it has exits.

  Args:
    path: a workdir, or ''.
    network: else, the name of a configuration.
  """
  if network in ranet_network.CONFIGURATIONS:
    return _of_configuration(network)
  if not path:
    return None
  trained = workdir.load(path, mesh_lib.create(1))
  return trained if isinstance(trained.model, RANet) else None


def _of_configuration(name: str) -> workdir.Trained:
  is_cifar = ranet_network.CONFIGURATIONS[name]['stem'] == 'cifar'
  class_names = tuple(map(str, range(10 if is_cifar else 1000)))
  model = models.create_ranet(
    network={'configuration': name},
    image_px=32 if is_cifar else 224,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    num_classes=len(class_names),
  )
  params, batch_stats = model.init(jax.random.key(0))
  return workdir.Trained(
    model=model,
    params=params,
    batch_stats=batch_stats,
    has_router=False,
    class_names=class_names,
    config=ml_collections.ConfigDict(),
    origin='random weights',
  )


def run(
  trained: workdir.Trained,
  to: str,
  *,
  batches: Sequence[int],
  rounds: int,
  images: int,
) -> None:
  """Times a model, prints tables and leaves them in a folder.

  Args:
    trained: from `subject`.
    to: the folder.
    batches: sizes to compile for; the largest is that of bulk work.
    rounds: timed ones.
    images: of a bulk round.
  """
  arrays, contract = _arrays(trained, images), _contract(trained)
  engine = StageEngine(trained, batches={1, *batches})
  classifier = EarlyExitClassifier(contract, engine)
  classifier.calibration = _calibration(classifier, arrays)
  device = jax.devices()[0].device_kind
  print(f'{device}, {os.cpu_count()} processor cores, {trained.origin}\n')
  tables = {
    'exit_stages': time_stages(classifier, rounds),
    'exit_worth': time_predictions(classifier, arrays, rounds),
  }
  os.makedirs(to, exist_ok=True)
  for name, rows in tables.items():
    print(
      terminal.table(
        [
          {
            k: f'{v:.4g}' if isinstance(v, float) else str(v)
            for k, v in row.items()
          }
          for row in rows
        ]
      )
    )
    print()
    with open(os.path.join(to, f'{name}.csv'), 'w', newline='') as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  print(f'Written to {to}: {", ".join(tables)} (.csv)')


def time_stages(classifier: EarlyExitClassifier, rounds: int) -> list[dict]:
  """Each stage by itself: a row for each, and batch."""
  engine, gmacs = classifier.engine, np.asarray(classifier.contract.gmacs)
  of_stage = np.diff(gmacs, prepend=0.0)
  jobs = {
    (k, batch): functools.partial(lambda job: np.asarray(job()), job)
    for batch in sorted({1, engine.best_batch})
    for k, job in enumerate(costs.stage_jobs(engine, batch))
  }
  rows = []
  for (k, batch), taken in interleaved(jobs, rounds, 'stages').items():
    ms = 1e3 * float(np.median(taken)) / batch
    rows.append(
      {
        'stage to exit': k + 1,
        'batch': batch,
        'mmacs': 1e3 * float(of_stage[k]),
        'ms_per_image': ms,
        'gmacs_per_second': 1e3 * float(of_stage[k]) / ms,
      }
    )
  return rows


def time_predictions(
  classifier: EarlyExitClassifier, arrays: Sequence[np.ndarray], rounds: int
) -> list[dict]:
  """Whole predictions at several budgets, against the last exit for all."""
  full = classifier.contract.gmacs[-1]
  jobs, spent = {}, {}
  for mode, images in (('single', arrays[:_SINGLES]), ('bulk', arrays)):
    for share in (*_SHARES, 1.0):
      jobs[mode, share] = functools.partial(
        _predict, classifier, share, images, mode == 'single', spent, mode
      )
  taken = interleaved(jobs, rounds, 'predictions')
  rows = []
  for (mode, share), seconds in taken.items():
    if share == 1.0:
      continue
    count = len(arrays) if mode == 'bulk' else len(arrays[:_SINGLES])
    implied = full / spent[mode, share]
    realised = float(np.median(taken[mode, 1.0] / seconds))
    rows.append(
      {
        'mode': mode,
        'share of the full cost': share,
        'gmacs': spent[mode, share],
        'full_ms': 1e3 * float(np.median(taken[mode, 1.0])) / count,
        'early_exit_ms': 1e3 * float(np.median(seconds)) / count,
        'implied': implied,
        'realised': realised,
        'realised_of_implied': realised / implied,
      }
    )
  return rows


def _predict(classifier, share, images, singly, spent, mode) -> None:
  contract = classifier.contract
  if share == 1.0:
    classifier.set_exit(len(contract.gmacs))
  else:
    classifier.set_thresholds(
      classifier.calibration.find(gmacs=share * contract.gmacs[-1]).thresholds
    )
  if singly:
    answers = [classifier.predict([image])[0] for image in images]
  else:
    answers = classifier.predict(images)
  spent[mode, share] = float(np.mean([x.gmacs for x in answers]))


def _calibration(classifier, arrays) -> ExitCalibration:
  """Of the very images that are timed: the budget is what is to be met."""
  found = []
  for k in range(1, classifier.engine.num_exits + 1):
    classifier.set_exit(k)
    found.append([x.probability for x in classifier.predict(arrays)])
  confidence = np.asarray(found).T
  return ExitCalibration(
    confidence,
    np.zeros(confidence.shape, bool),
    Costs('GMACs', classifier.contract.gmacs, 0.0, ''),
    None,
    'timed images',
  )


def _contract(trained: workdir.Trained) -> Contract:
  if trained.config:
    return Contract.of(trained)
  return Contract.of_model(
    trained.model,
    resize_px=0,
    keep_aspect=True,
    has_router=False,
    decode='full',
    class_names=trained.class_names,
    origin=trained.origin,
  )


def _arrays(trained: workdir.Trained, count: int) -> list[np.ndarray]:
  """Test images, or noise of differing brightness and contrast."""
  side = trained.model.image_px
  if trained.config:
    data = settings.call(Data, trained.config.data, 'config.data')
    examples = data.open(data.test_split).examples
    return [
      data.eval_image(examples[i]['image'], side)
      for i in range(min(count, len(examples)))
    ]
  rng = np.random.default_rng(0)
  low = rng.integers(0, 200, (count, 1, 1, 3))
  noise = rng.integers(0, 56, (count, side, side, 3))
  return list((low + noise).astype(np.uint8))
