"""Arrays inside `shard_map` and `pmap`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

PyTree = Any


def device_local(tree: PyTree, axis_name: str | None) -> PyTree:
    """Marks replicated arrays as device-local, so that their gradients stay local.

    Otherwise `shard_map` sums the gradients over devices by itself.
    """
    if axis_name is None:
        return tree

    def mark(x):
        if axis_name in jax.typeof(x).manual_axis_type.varying:
            return x
        return jax.lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(mark, tree)


def zeros_beside(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros that may be added to where `x` differs between devices."""
    zeros = jnp.zeros(shape, dtype)
    for axis_name in jax.typeof(x).manual_axis_type.varying:
        zeros = device_local(zeros, axis_name)
    return zeros
