"""Weights on the simplex of the tasks that are present."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float


def project(
    values: Float[Array, " tasks"], present: Bool[Array, " tasks"]
) -> Float[Array, " tasks"]:
    """The nearest weights that are not negative and sum to one, zero on absent tasks.

    Args:
      values: anything, of any size.
      present: tasks that may have a weight.

    Returns:
      The weights; all zero if no task is present.
    """
    # What is one or more below the largest value gets no weight, so that nothing is
    # lost by cutting there. Subtracted first, or large values would round it away.
    top = jnp.max(jnp.where(present, values, -jnp.inf))
    gaps = jnp.where(present, jnp.maximum(values - top, -2.0), -2.0)
    weights = optax.projections.projection_simplex(gaps)
    return jnp.where(present, weights, 0.0)


def shares(
    weights: Float[Array, " tasks"], present: Bool[Array, " tasks"]
) -> Float[Array, " tasks"]:
    """What the tasks that are present have of their common weight.

    Args:
      weights: not negative.
      present: tasks among which the shares sum to one.

    Returns:
      The shares, equal ones if the tasks have no weight at all; zero on absent tasks.
    """
    weights = jnp.where(present, weights, 0.0)
    total = jnp.sum(weights)
    equal = present / jnp.maximum(jnp.sum(present), 1)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), equal)


def redistribute(
    weights: Float[Array, " tasks"],
    new_shares: Float[Array, " tasks"],
    present: Bool[Array, " tasks"],
) -> Float[Array, " tasks"]:
    """Weights of all tasks after those present have new shares of what they had.

    Args:
      weights: those before; absent tasks keep theirs, so that the sum stays one.
      new_shares: as by `project`; if they are not finite, nothing changes.
      present: tasks whose weights change.

    Returns:
      The new weights.
    """
    total = jnp.sum(jnp.where(present, weights, 0.0))
    moves = present & jnp.all(jnp.isfinite(new_shares))
    return jnp.where(moves, total * new_shares, weights)
