"""DB-MTL: dual-balancing multi-task learning."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer

_EPS = 1e-8


class DBMTLState(NamedTuple):
    """State of `db_mtl`.

    Attributes:
      step: `()` int32, steps taken.
      average: params-shaped, leaves of shape `(tasks, *leaf.shape)` float32: moving
        averages of the gradients of the log losses.
    """

    step: Array
    average: Any


def db_mtl(
    num_tasks: int, *, beta: float = 0.9, beta_sigma: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Takes logs of the losses, averages gradients over steps and makes them as long.

    With :math:`g_t = \nabla \log(L_t + 10^{-8})`, averaged as :math:`\hat g_t
    \leftarrow g_t + \beta k^{-\sigma} (\hat g_t - g_t)` in step :math:`k`, from zero,
    the direction is :math:`d = \max_i \|\hat g_i\| \sum_t \hat g_t / \|\hat g_t\|`. It
    does not depend on the scale of a loss. Task-specific parameters get the gradients
    of their log losses.

    Args:
      num_tasks: number of tasks.
      beta: :math:`\beta` in [0, 1), the weight of the past.
      beta_sigma: :math:`\sigma`, not negative: how fast it is forgotten.

    Returns:
      A balancer with state, K times the size of the parameters. Needs `losses`, which
      must not be negative. Absent tasks keep their averages, and these do not move the
      parameters.

    Raises:
      ValueError: if an argument is out of its range, or `losses` are not passed to the
        update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = db_mtl(2, beta=0.0)
      >>> grads, losses = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 2.0])
      >>> print(tx.update(grads, tx.init(grads[0]), losses=losses)[0])
      [3. 3.]

    References:
      Dual-Balancing for Multi-Task Learning, 2023, algorithm 1.
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"`beta` must be in [0, 1), got {beta}.")
    if beta_sigma < 0:
        raise ValueError(f"`beta_sigma` must not be negative, got {beta_sigma}.")

    def init(params):
        zeros = lambda p: jnp.zeros((num_tasks, *jnp.shape(p)), jnp.float32)
        return DBMTLState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(grads, state, step):
        logs = grads.scale(1.0 / (jnp.maximum(step.losses, 0.0) + _EPS))
        rate = beta * (state.step + 1.0) ** -beta_sigma
        over = lambda x, g: x.reshape(-1, *[1] * (g.ndim - 1))

        def average(g, old):
            return jnp.where(over(step.present, g), g + rate * (old - g), old)

        stacked = logs.stack()
        rows = jax.tree.map(lambda g: g.astype(jnp.float32), stacked)
        averages = jax.tree.map(average, rows, state.average)
        shared = jax.tree.leaves(grads.shared)
        squares = [
            jnp.sum(g**2, axis=tuple(range(1, g.ndim)))
            for g, is_shared in zip(jax.tree.leaves(averages), shared, strict=True)
            if is_shared
        ]
        norms = jnp.where(step.present, jnp.sqrt(sum(squares)), 0.0)
        longer = jnp.max(norms) / jnp.where(norms > 0, norms, 1.0)
        weights = jnp.where(step.present, longer, 0.0)

        def combine(is_shared, g, row, averaged):
            if is_shared:
                total = jnp.sum(over(weights, averaged) * averaged, axis=0)
            else:
                total = jnp.sum(jnp.where(over(step.present, row), row, 0.0), axis=0)
            return total.astype(g.dtype)

        updates = jax.tree.map(combine, grads.shared, stacked, rows, averages)
        # A gradient that is not finite shows in the update alone.
        kept = jax.tree.map(
            lambda new, old: jnp.where(jnp.isfinite(new), new, old),
            averages,
            state.average,
        )
        return updates, DBMTLState(state.step + 1, kept)

    return balancer("db_mtl", init, update, num_tasks=num_tasks, needs=("losses",))
