"""The Gramian in terms of directions and lengths."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.balancing.solvers import in_units


class Cosines(NamedTuple):
    """Cosines and norms of gradients.

    Attributes:
      matrix: `(tasks, tasks)` cosines; rows of the identity for inactive tasks.
      norms: `(tasks,)` gradient norms; 1 for inactive tasks.
      active: `(tasks,)` False where the gradient is zero or the task absent.
    """

    matrix: Array
    norms: Array
    active: Array


def cosines(gramian: Float[Array, "tasks tasks"]) -> Cosines:
    """Splits a Gramian into cosines and norms."""
    scaled, units, active = in_units(gramian)
    lengths = jnp.sqrt(jnp.diagonal(scaled))
    eye = jnp.eye(len(units), dtype=gramian.dtype)
    matrix = jnp.clip(scaled / lengths[:, None] / lengths[None, :], -1.0, 1.0)
    return Cosines(matrix * (1.0 - eye) + eye, units * lengths, active)
