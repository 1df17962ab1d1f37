# SPDX-License-Identifier: Apache-2.0
"""Devices as one mesh axis, `data`, and how arrays lie on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from drnet_jax.errors import UserError

DATA_AXIS = 'data'


def create(num_devices: int | None = None) -> Mesh:
  """Returns a mesh over all devices (of all processes), or the first few."""
  devices = jax.devices()[:num_devices]
  # Auto: with JAX's default, Explicit, the gradient of an integer-label
  # cross-entropy fails to type-check from jax 0.11 on.
  return jax.make_mesh(
    (len(devices),),
    (DATA_AXIS,),
    axis_types=(AxisType.Auto,),
    devices=devices,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
  """The leading axis is cut into one piece per device, in device order."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch(batch_size: int, mesh: Mesh, field: str) -> None:
  """Raises UserError unless `batch_size` divides over the devices."""
  if batch_size < 1 or batch_size % mesh.size:
    raise UserError(
      f'{field} = {batch_size} cannot be divided over {mesh.size} devices: '
      f'choose {mesh.size} or a multiple of it'
    )


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh):
  """Puts this process's part of a global batch on its devices."""
  sharding = by_batch(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
