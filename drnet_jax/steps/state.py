# SPDX-License-Identifier: Apache-2.0
"""The whole state of a training run: what a checkpoint holds."""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class TrainState:
  """Everything that changes from one step to the next.

  There is no random key in it: randomness is `fold_in(key, step)`, so a resumed
  run draws what the unbroken one would have drawn.

  Attributes:
    step: int32 scalar, steps taken within the stage.
    params: see the model.
    batch_stats: see the model.
    opt_state: of the stage's optimiser.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
