"""PCGrad: projecting conflicting gradients."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtjax.balancing.balancer import (
    balancer,
    check_choice,
    default_key,
    masked_gramian,
)


class PCGradState(NamedTuple):
    """State of `pcgrad`.

    Attributes:
      key: `()` random key of the next step's orders.
    """

    key: Array


def pcgrad(
    *, reduction: Literal["sum", "mean"] = "sum", key: Array | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Projects each task's gradient off the gradients that it conflicts with.

    For each task :math:`i`, starting from :math:`g'_i = g_i`, and for the other tasks
    :math:`j` in random order: if :math:`\langle g'_i, g_j \rangle < 0`,
    :math:`g'_i \leftarrow g'_i - \langle g'_i, g_j \rangle g_j / \|g_j\|^2`. The
    direction is :math:`\sum_i g'_i`. All of it happens on the Gramian.

    With two tasks the direction conflicts with neither gradient; with three or more
    there is no such guarantee (see `upgrad`).

    Args:
      reduction: "sum", or "mean" over the tasks that are present.
      key: random key of the orders, `jax.random.key(0)` if not given. A `key` that is
        passed to the update takes its place in that step.

    Returns:
      A balancer, with the key as its state.

    Raises:
      ValueError: if `reduction` is neither "sum" nor "mean".

    Example:
      >>> import jax.numpy as jnp
      >>> tx = pcgrad()
      >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [0.5 1.5]

    References:
      Gradient Surgery for Multi-Task Learning, 2020, algorithm 1: one order per task,
      the sum as in its equation. Some public implementations average or draw one order
      for all tasks.
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    start = default_key(key)

    def init(params):
        del params
        return PCGradState(jnp.copy(start))

    def update(grads, state, step):
        next_key, step_key = jax.random.split(state.key)
        if step.key is not None:
            step_key = step.key
        gramian = masked_gramian(grads, step)
        weights = surgery_weights(gramian, key=step_key).sum(0)
        if reduction == "mean":
            weights = weights / jnp.maximum(jnp.sum(step.present), 1)
        return grads.combine(weights), PCGradState(next_key)

    return balancer("pcgrad", init, update)


def surgery_weights(
    gramian: Float[Array, "tasks tasks"], *, key: Array
) -> Float[Array, "tasks tasks"]:
    """The projected gradients, each as weights of the original ones.

    Args:
      gramian: inner products of the tasks' gradients.
      key: random key of the orders.

    Returns:
      Row i holds the weights that make the projected gradient of task i.
    """
    num_tasks = len(gramian)
    tasks = jnp.arange(num_tasks)
    squares = jnp.diagonal(gramian)
    inverse = jnp.where(squares > 0, 1.0 / jnp.where(squares > 0, squares, 1.0), 0.0)
    orders = random_orders(num_tasks, key=key)

    def project(weights, others):
        # `others[i]` is the task that row i is projected off in this round.
        product = jnp.sum(weights * gramian[others], axis=1)
        conflicts = (product < 0) & (others != tasks)
        removed = jnp.where(conflicts, product * inverse[others], 0.0)
        return weights.at[tasks, others].add(-removed), None

    eye = jnp.eye(num_tasks, dtype=gramian.dtype)
    return jax.lax.scan(project, eye, orders.T)[0]


def random_orders(num_tasks: int, *, key: Array) -> Int[Array, "tasks tasks"]:
    """One random order of all tasks for each task, as rows."""
    keys = jax.random.split(key, num_tasks)
    return jax.vmap(lambda k: jax.random.permutation(k, num_tasks))(keys)
