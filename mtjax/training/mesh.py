"""Device meshes: replicated or fully sharded parameters, batches over all devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of one axis named ``"data"``.

    Args:
      devices: devices of the mesh in their order; all devices of all processes by
        default.

    Returns:
      The mesh. Its axis is of type Auto: the compiler places the collectives, and a
      step written for one device runs unchanged.

    Raises:
      ValueError: if ``devices`` is empty.

    Example:
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> mesh.axis_names, mesh.size
      (('data',), 1)
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) == 0:
        raise ValueError("`devices` must hold at least one device, got none.")
    return jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a full copy of every array on every device of the mesh.

    Args:
      tree: pytree of arrays, equal on all processes.
      mesh: the mesh, see `data_mesh`.

    Returns:
      The same tree with replicated arrays. They may share memory with the arguments.

    Example:
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> replicate({"w": np.ones(3)}, mesh)["w"].sharding.spec
      P()
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    return place(tree, jax.tree.map(lambda _: sharding, tree))


def place(tree: Any, shardings: Any) -> Any:
    """Puts every array where its sharding says, also with several processes.

    Args:
      tree: pytree of arrays, equal on all processes; typed keys are allowed.
      shardings: tree of shardings of the same structure, see `fully_sharded`.

    Returns:
      The same tree with its arrays moved. They may share memory with the arguments.

    Example:
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> tree = {"w": np.ones((4, 8))}
      >>> place(tree, fully_sharded(tree, mesh, min_size=0))["w"].sharding.spec
      P(None, 'data')
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    # `device_put` takes neither typed keys nor committed arrays to other processes.
    def put(leaf, sharding):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    return jax.tree.map(put, tree, shardings)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits the leading axis of every array over the devices of the mesh.

    With several processes each one passes its own part of the batch, and the result is
    the global batch: process 0's rows first, then process 1's, and so on.

    Args:
      batch: pytree of arrays of shape ``(batch, ...)``; arrays without axes are
        replicated.
      mesh: the mesh, see `data_mesh`.

    Returns:
      The same tree with sharded arrays.

    Raises:
      ValueError: if a leading axis cannot be divided by the number of devices that
        this process has in the mesh.

    Example:
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> shard_batch({"x": np.ones((4, 2))}, mesh)["x"].sharding.spec
      P('data',)
    """
    local = len(mesh.local_devices)

    def put(path, leaf):
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        if leaf.ndim == 0:
            return replicate(leaf, mesh)
        if leaf.shape[0] % local:
            raise ValueError(
                "`batch` must have leading axes divisible by the number of local "
                f"devices, got {leaf.shape[0]} rows for {local} devices in "
                f"batch{jax.tree_util.keystr(path)}; change the batch size or drop "
                "the remainder."
            )
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map_with_path(put, batch)


def fully_sharded(tree: Any, mesh: Mesh, *, min_size: int = 2**16) -> Any:
    """Chooses a sharding for every array so that each device holds a part of it.

    Each array is split along its largest axis that the number of devices divides (the
    first of equals); small arrays, and those without such an axis, are replicated. Use
    it on a whole `TrainState`: optimizer moments are split like their parameters.

    Args:
      tree: pytree of arrays or of ``jax.ShapeDtypeStruct``.
      mesh: the mesh, see `data_mesh`.
      min_size: arrays of fewer elements are replicated, at least 0; their communication
        costs more than their memory.

    Returns:
      A tree of shardings, for `place` and for ``state_sharding`` of `make_train_step`.

    Raises:
      ValueError: if ``min_size`` is negative.

    Example:
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> tree = {"w": np.ones((4, 8)), "b": np.ones(8)}
      >>> {k: s.spec for k, s in fully_sharded(tree, mesh, min_size=16).items()}
      {'b': P(), 'w': P(None, 'data')}
    """
    if min_size < 0:
        raise ValueError(f"`min_size` must be at least 0, got {min_size}.")
    num_devices = mesh.shape[AXIS]

    def choose(leaf):
        axes = [i for i, n in enumerate(leaf.shape) if n and n % num_devices == 0]
        if leaf.size < min_size or not axes:
            return NamedSharding(mesh, PartitionSpec())
        axis = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(choose, tree)


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run; afterwards every process sees all devices.

    Call it before anything touches a device. On TPU pods, Slurm and Open MPI leave all
    arguments out; elsewhere give all three.

    Args:
      coordinator_address: ``"host:port"`` of process 0.
      num_processes: number of processes, at least 1.
      process_id: index of this process, in ``[0, num_processes)``.

    Raises:
      ValueError: if only some of the arguments are given, or ``process_id`` is out of
        range.

    Example:
      >>> initialize_distributed("localhost:1234", num_processes=2)
      Traceback (most recent call last):
      ...
      ValueError: `coordinator_address`, `num_processes` and `process_id` must be ...
    """
    given = [x is not None for x in (coordinator_address, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            "`coordinator_address`, `num_processes` and `process_id` must be given "
            f"together or not at all, got {coordinator_address!r}, {num_processes!r} "
            f"and {process_id!r}."
        )
    if (
        num_processes is not None
        and process_id is not None
        and not 0 <= process_id < num_processes
    ):
        raise ValueError(
            f"`process_id` must be in [0, {num_processes}), got {process_id}."
        )
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
