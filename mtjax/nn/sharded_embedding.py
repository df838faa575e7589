"""Embedding tables whose rows lie on several devices."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int


def row_sharding(mesh: Mesh, axis: str = "data") -> NamedSharding:
    """The sharding of a table whose rows are split along an axis of a mesh.

    Args:
      mesh: the devices.
      axis: name of one of its axes.

    Returns:
      Device i of n holds the i-th of n blocks of consecutive rows, and whole rows.

    Raises:
      ValueError: if the mesh has no such axis.

    Example:
      >>> from mtjax.training import data_mesh
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> row_sharding(mesh).spec
      P('data', None)
    """
    if axis not in mesh.shape:
        raise ValueError(
            f"`axis` must be one of the mesh's axes {mesh.axis_names}, got {axis!r}."
        )
    return NamedSharding(mesh, PartitionSpec(axis, None))


def take_sharded(
    table: Float[Array, "rows width"],
    rows: Int[Array, "*shape"],
    *,
    mesh: Mesh,
    axis: str = "data",
    rows_axis: str | None = None,
) -> Float[Array, "*shape width"]:
    """Looks rows up in a table that is split by `row_sharding`.

    Every device looks up what it holds and has zeros for the rest; a sum over devices
    puts the vectors together, exactly. The table is never gathered: what travels are
    row numbers and vectors of the batch. Gradients of the table are split like it.

    Args:
      table: its number of rows a multiple of the number of devices along `axis`; see
        `row_multiple` of `mtjax.nn.FieldEmbeddings`.
      rows: numbers in [0, rows). Others give zeros.
      mesh: the devices.
      axis: along which rows of the table are split.
      rows_axis: along which the first axis of `rows` is split, such as that of the
        batch; it may be `axis`. None if every device has all of them.

    Returns:
      The vectors, split like `rows`.

    Raises:
      ValueError: if the mesh lacks an axis, or rows cannot be split evenly.

    Example:
      >>> from mtjax.training import data_mesh
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> table = jax.device_put(jnp.array([[1.0], [2.0]]), row_sharding(mesh))
      >>> print(take_sharded(table, jnp.array([1, 0, 5]), mesh=mesh)[:, 0])
      [2. 1. 0.]
    """
    sharding = row_sharding(mesh, axis)
    count = mesh.shape[axis]
    if len(table) % count:
        raise ValueError(
            f"`table` must have a number of rows that {count} devices divide, got "
            f"{len(table)}; add unused rows."
        )
    if rows_axis is not None and rows_axis not in mesh.shape:
        raise ValueError(
            f"`rows_axis` must be one of {mesh.axis_names} or None, got {rows_axis!r}."
        )
    held = len(table) // count
    together = rows_axis == axis

    def look_up(part: Array, rows: Array) -> Array:
        if together:
            rows = jax.lax.all_gather(rows, axis, tiled=True)
        local = rows - jax.lax.axis_index(axis) * held
        here = (local >= 0) & (local < held)
        vectors = jnp.take(part, jnp.where(here, local, 0), axis=0, mode="clip")
        vectors = jnp.where(here[..., None], vectors, 0.0)
        if together:
            return jax.lax.psum_scatter(vectors, axis, tiled=True)
        return jax.lax.psum(vectors, axis)

    spec = PartitionSpec(rows_axis)
    return jax.shard_map(
        look_up, mesh=mesh, in_specs=(sharding.spec, spec), out_specs=spec
    )(table, rows)
