"""Stacked gradients, leaf by leaf: one row per task."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.gradients import TaskGradients


def present_rows(grads: TaskGradients, present: Bool[Array, " tasks"]) -> Any:
    """All tasks' gradients, zero for absent tasks even where they are NaN."""
    return jax.tree.map(
        lambda g: jnp.where(per_row(present, g), g, jnp.zeros_like(g)), grads.stack()
    )


def per_row(values: Array, rows: Array) -> Array:
    """One value per task in the shape that multiplies the rows."""
    return values.reshape(-1, *[1] * (rows.ndim - 1))


def row_sums(rows: Array) -> Float[Array, " tasks"]:
    """The sum over each row, float32."""
    return jnp.sum(rows.astype(jnp.float32), axis=tuple(range(1, rows.ndim)))
