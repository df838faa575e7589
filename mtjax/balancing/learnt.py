"""Training of one number per task beside the model."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import keep_absent, keep_moments


def train_per_task(
    optimizer: optax.GradientTransformation,
    slopes: Float[Array, " tasks"],
    values: Float[Array, " tasks"],
    opt_state: Any,
    moves: Bool[Array, " tasks"],
) -> tuple[Float[Array, " tasks"], Any]:
    """One step of an optimizer, after which the tasks that do not move are as before.

    Args:
      optimizer: of the numbers.
      slopes: gradient of what they minimise.
      values: the numbers.
      opt_state: the optimizer's state.
      moves: tasks whose number moves.

    Returns:
      The numbers and the optimizer's state, where what belongs to tasks that do not
      move is bit-identical.
    """
    slopes = jnp.where(moves, slopes, 0.0)
    change, after = optimizer.update(slopes, opt_state, values)
    moved: Any = optax.apply_updates(values, change)
    after = keep_moments(optimizer, after, opt_state, moves, others=jnp.any(moves))
    return keep_absent(moved, values, moves), after
