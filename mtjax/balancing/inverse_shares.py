"""Weights that are inverse to each task's share in a sum, averaged over steps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import Step, balancer, keep_absent
from mtjax.gradients import TaskGradients


class InverseSharesState(NamedTuple):
    """State of `grad_norm_weights` and `ntk_weights`.

    Attributes:
      step: `()` int32, steps taken.
      weights: `(tasks,)` float32.
    """

    step: Array
    weights: Array


def inverse_shares(
    name: str,
    num_tasks: int,
    measure: Callable[[TaskGradients, Step], Float[Array, " tasks"]],
    *,
    momentum: float,
    update_every: int,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes a balancer of a measure of the tasks' sizes.

    The weights are moving averages of :math:`\sum_s m_s / m_t`, over the present tasks.

    Args:
      name: the factory's name, for error messages.
      num_tasks: number of tasks.
      measure: `measure(grads, step) -> sizes`, not negative; it is evaluated in the
        steps alone in which the weights move. A task whose size is zero or not finite
        keeps its weight.
      momentum: factor of the weights before, in [0, 1).
      update_every: the weights move in the first step and every so many steps.

    Returns:
      The transform; the weights apply to shared and to task-specific parameters alike.

    Raises:
      ValueError: if an argument is out of its range.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
    if update_every < 1:
        raise ValueError(f"`update_every` must be at least 1, got {update_every}.")

    def init(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return InverseSharesState(jnp.zeros((), jnp.int32), ones)

    def update(grads, state, step):
        def move():
            sizes = measure(grads, step)
            moves = step.present & jnp.isfinite(sizes) & (sizes > 0)
            total = jnp.sum(sizes, where=moves)
            ratios = total / jnp.where(moves, sizes, 1.0)
            averaged = momentum * state.weights + (1.0 - momentum) * ratios
            return keep_absent(averaged, state.weights, moves)

        if update_every == 1:
            weights = move()
        else:
            due = state.step % update_every == 0
            weights = jax.lax.cond(due, move, lambda: state.weights)
        state = InverseSharesState(state.step + 1, weights)
        return grads.scale(weights).combine(), state

    return balancer(name, init, update, num_tasks=num_tasks)
