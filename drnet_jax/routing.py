# SPDX-License-Identifier: Apache-2.0
"""Which size each image runs at, and how images of one size are gathered.

Pure functions. `R` is the number of candidate sizes, `B` a batch, and a *slot*
one place in the sub-batch that a device runs at one size. XLA wants static
shapes, so the number of slots comes from a short ladder of bucket sizes and
the slots left over are masked.
"""

import bisect
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def straight_through(
  key: jax.Array, logits: jax.Array, *, tau: float | jax.Array
) -> jax.Array:
  """Samples a one-hot choice whose gradient is the Gumbel-softmax's.

  Args:
    key: a random key; the noise is drawn per image.
    logits: [B, R], the predictor's output.
    tau: temperature > 0 of the soft choice. The sample does not depend on it.

  Returns:
    [B, R], exactly 0 or 1.

  Source: DRNet (arXiv:2106.02898), Eq. 9 to 11. Departs: Eq. 11 as printed
  puts tau inside one term only; the standard softmax((log p + g) / tau) is
  meant and used.
  """
  gumbel = jax.random.gumbel(key, logits.shape, logits.dtype)
  soft = jax.nn.softmax((logits + gumbel) / tau)
  hard = jax.nn.one_hot(soft.argmax(-1), soft.shape[-1], dtype=soft.dtype)
  # The brackets keep zeros exact: soft - soft is 0 before it meets `hard`.
  return hard + (soft - jax.lax.stop_gradient(soft))


def choose(logits: jax.Array) -> jax.Array:
  """The choice at inference, int32 [B]: argmax of logits [B, R], no noise."""
  return logits.argmax(-1).astype(jnp.int32)


def bucket_ladder(
  largest: int, *, growth: float, platform: str
) -> tuple[int, ...]:
  """Ascending bucket sizes up to `largest`, each about `growth` times more.

  Each rung costs a compilation, so there are none where they save no time: an
  accelerator takes about as long for fewer images than 16, a TPU's layouts hold
  images by eights, a CPU's vectors four float32. The smallest rung is an eighth
  of the largest or more.

  Args:
    largest: slots needed when every image picks the same size.
    growth: > 1; padding wastes about (growth - 1) / 2 of a sub-batch.
    platform: of the devices, as JAX names it.
  """
  multiple = 8 if platform == 'tpu' else 4
  least = max(largest / 8, 1 if platform == 'cpu' else 16)
  sizes = [largest]
  while (rung := _next_rung(sizes[-1], growth, multiple)) >= least:
    sizes.append(rung)
  return tuple(reversed(sizes))


def _next_rung(size: int, growth: float, multiple: int) -> int:
  def rounded_up(slots: float) -> int:
    return -(-int(slots) // multiple) * multiple

  rung = rounded_up(size / growth)
  # Small sizes are further apart than `growth`.
  return rung if rung < size else rounded_up(size - multiple)


def bucket(count: int, ladder: Sequence[int]) -> int:
  """The smallest rung of the ladder that holds `count` images."""
  return ladder[bisect.bisect_left(ladder, count)]


def evenly_spread(count: int, batch: int) -> np.ndarray:
  """Indices into a device's batch.

  The same images on any number of devices that can share them evenly.
  """
  return np.arange(count) * batch // max(count, 1)


def slots(
  choice: jax.Array, size_index: int, num_slots: int
) -> tuple[jax.Array, jax.Array]:
  """Finds the images that chose one size.

  Args:
    choice: int [B], index of the chosen size of each image on this device.
    size_index: the size to gather.
    num_slots: at least the number of images that chose it.

  Returns:
    indices int32 [num_slots] into the batch, in order; and their mask, bool
    [num_slots], False on slots left over (which point at image 0).
  """
  chosen = choice == size_index
  (indices,) = jnp.nonzero(chosen, size=num_slots, fill_value=0)
  return indices.astype(jnp.int32), jnp.arange(num_slots) < chosen.sum()
