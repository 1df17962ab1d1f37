# SPDX-License-Identifier: Apache-2.0
"""The mesh of devices, and how batches and parameters lie on it.

The mesh has two axes. A batch is cut along both: every device has its own part
of it. Parameters (and the optimiser's state) are whole on every device, or cut
along `shard` only: then a row of the mesh shares one copy, and each device
gathers them for the time of a step.
"""

import jax
import numpy as np
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from drnet_jax.errors import UserError

SHARD_AXIS = 'shard'
BATCH = PartitionSpec(('data', SHARD_AXIS))


def create(
  num_devices: int | None = None, *, parameter_shards: int = 1
) -> Mesh:
  """Makes a mesh.

  Args:
    num_devices: the first few devices only; None for all, of all processes.
    parameter_shards: devices that share one copy of the parameters; 0 for one
      copy on all devices together.

  Raises:
    UserError: the devices cannot be divided so.
  """
  # Those of a process side by side, as its part of a batch is.
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  devices = devices[:num_devices]
  shards = parameter_shards or len(devices)
  if shards < 1 or len(devices) % shards:
    raise UserError(
      f'config.parameter_shards = {shards} does not divide {len(devices)} '
      'devices; 1 is a whole copy of the parameters on each, 0 one on all'
    )
  # Auto: with JAX's default, Explicit, the gradient of an integer-label
  # cross-entropy fails to type-check from jax 0.11 on.
  return Mesh(
    np.array(devices).reshape(-1, shards),
    ('data', SHARD_AXIS),
    axis_types=(AxisType.Auto,) * 2,
  )


def platform(mesh: Mesh | AbstractMesh) -> str:
  """Of its devices, as JAX names it; an abstract mesh stands for TPUs."""
  if isinstance(mesh, AbstractMesh):
    return 'tpu'
  return mesh.devices[0, 0].platform


def describe() -> str:
  """The devices, as a line: '8 x TPU v5 lite, of 2 processes'."""
  line = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  if jax.process_count() > 1:
    line += f', of {jax.process_count()} processes'
  return line


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
  """The leading axis is cut into one piece per device, in device order."""
  return NamedSharding(mesh, BATCH)


def shardings(tree, mesh: Mesh):
  """How each array of a state (or of its shapes) lies between two steps.

  Kernels are cut along their longest axis that can be divided by the number of
  shards; vectors (to cut them saves nothing and costs a message) and all else
  are on every device.
  """
  shards = mesh.shape[SHARD_AXIS]

  def sharding(x) -> NamedSharding:
    axes = [i for i, n in enumerate(x.shape) if n % shards == 0]
    if shards == 1 or not axes or x.ndim < 2:
      return replicated(mesh)
    longest = max(axes, key=lambda i: x.shape[i])
    spec = [None] * x.ndim
    spec[longest] = SHARD_AXIS
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(sharding, tree)


def placed(abstract, by_leaf):
  """Shapes and dtypes of a tree, each with its sharding from another tree."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    by_leaf,
  )


def gathered(tree, mesh: Mesh):
  """Within a program: the whole of each array on every device."""
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


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
