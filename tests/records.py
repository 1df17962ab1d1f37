# SPDX-License-Identifier: Apache-2.0
"""Records and calibrations to test with, made up or of a tiny model."""

import dataclasses
import types

import numpy as np

from drnet_jax import mesh as mesh_lib
from drnet_jax.choosing import policy as policy_lib
from drnet_jax.choosing import record as record_lib
from drnet_jax.choosing.calibration import Calibration
from drnet_jax.choosing.options import Costs, Options
from drnet_jax.choosing.policy import Policy
from drnet_jax.choosing.record import Record
from drnet_jax.run import workdir
from drnet_jax.run.recording import Evaluator

# Correct at (1, 2, 4) GMACs:   small  medium  large   chosen
RIGHT = np.array(
  [
    [1, 1, 1],  # small
    [0, 1, 1],  # medium
    [0, 0, 1],  # large
    [0, 0, 0],  # small
  ]
)
CHOICE = [0, 1, 2, 0]


def make_record(
  right=RIGHT,
  choice=CHOICE,
  *,
  names=('10 px', '20 px', '30 px'),
  gmacs=(1.0, 2.0, 4.0),
  predictor_gmacs=0.5,
  probabilities=None,
  **changes,
) -> Record:
  """A record small enough to work out by hand.

  Args:
    right: [N, R], whether each option is right: all labels are 1.
    choice: [N], the option that the predictor is sure of; None without one.
    names, gmacs: [R], of the options.
    predictor_gmacs: of the predictor.
    probabilities: [N, R, K]; what is said then follows from these, also of the
      means of options. Without them every option is sure, and there are no
      means.
    **changes: other fields of the record.
  """
  right = np.asarray(right).astype(int)
  options = Options.of(names)
  fields = {
    'label': np.ones(len(right), int),
    'columns': tuple((j,) for j in range(len(options))),
    'predicted': right,
    'confidence': np.ones(right.shape),
    'top5': np.ones(right.shape, bool),
    'log_p': None,
    'draw': np.arange(len(right)) / len(right),
    'extra': {'digit_px': np.arange(len(right))},
  }
  if choice is not None:
    fields['log_p'] = np.log(np.eye(len(options))[choice] + 1e-9)
  if probabilities is not None:
    columns = options.columns
    p = np.asarray(probabilities, np.float32)
    fields |= record_lib.said(p, np.zeros(len(p), int), columns) | {
      'label': np.ones(len(p), int),
      'columns': columns,
      'top5': np.ones((len(p), len(columns)), bool),
    }
  fields |= changes
  return Record(
    options=options,
    costs=Costs('GMACs', tuple(gmacs), predictor_gmacs, 'by hand'),
    **{'margin': fields['confidence']} | fields,
  )


def router(record: Record) -> Policy:
  """The predictor of a record as it was trained."""
  return policy_lib.router(record.costs, policy_lib.routes(record))


def record_of(trained: workdir.Trained, images) -> Record:
  """Of a model, whose most expensive option counts as right.

  Args:
    trained: the model.
    images: uint8 [N, S, S, 3].
  """
  batch = {
    'image': images,
    'label': np.zeros(len(images), np.int32),
    'valid': np.ones(len(images), bool),
    'index': np.arange(len(images)),
  }
  record = Evaluator(trained.model, mesh_lib.create(1))(
    types.SimpleNamespace(eval_batches=lambda *_, **how: [batch]),
    types.SimpleNamespace(examples=images),
    'a test',
    trained.params,
    trained.batch_stats,
    batch_size=len(images),
    has_router=trained.has_router,
  )
  return dataclasses.replace(
    record,
    label=record.predicted[:, len(record.options) - 1],
    origin=f'{trained.origin}, weights {trained.digest}; a test',
  )


def calibration_of(trained: workdir.Trained, images) -> Calibration:
  """Of a model, as if its most expensive option were always right."""
  return Calibration.of(record_of(trained, images), split='a test')
