"""Constant task weights."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import optax

from mtjax.balancing.balancer import balancer


def constant(
    weights: Mapping[str, float] | Sequence[float],
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs the tasks' losses with fixed weights.

    :math:`d = \sum_t w_t g_t`, on shared and on task-specific parameters alike.

    Args:
      weights: :math:`w_t \ge 0`, by task name or in the order of the sorted names.

    Returns:
      A balancer, without state, of the cost of one backward pass.

    Raises:
      ValueError: if a weight is negative or not finite; at update time, if the tasks
        are not those of the gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = constant([2.0, 1.0])
      >>> print(tx.update(jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(None))[0])
      [2. 3.]
    """
    if isinstance(weights, Mapping):
        order = tuple(sorted(weights))
        values = [weights[task] for task in order]
    else:
        order, values = None, list(weights)
    if not values or not np.all(np.isfinite(values)) or min(values) < 0:
        raise ValueError(
            f"`weights` must be finite and not negative, one per task, got {weights}."
        )

    def update(grads, state, step):
        del step
        if order is not None and order != grads.tasks:
            raise ValueError(
                f"`weights` must name exactly the tasks {grads.tasks}, got {order}."
            )
        return grads.scale(jnp.array(values, jnp.float32)).combine(), state

    return balancer(
        "constant", lambda params: optax.EmptyState(), update, num_tasks=len(values)
    )
