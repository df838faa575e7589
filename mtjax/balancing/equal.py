"""Equal weighting: the plain sum or mean of the losses."""

from typing import Literal

import jax.numpy as jnp
import optax

from mtjax.balancing.balancer import balancer, check_choice


def equal(
    *, reduction: Literal["sum", "mean"] = "sum"
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the tasks' gradients up, or averages them: linear scalarisation.

    :math:`d = \sum_t g_t`, or :math:`\tfrac1T \sum_t g_t` over the :math:`T` tasks that
    are present, on shared and on task-specific parameters alike: it is training on the
    sum (mean) of the losses.

    Args:
      reduction: "sum" or "mean".

    Returns:
      A balancer, without state, of the cost of one backward pass.

    Raises:
      ValueError: if `reduction` is neither "sum" nor "mean".

    Example:
      >>> import jax.numpy as jnp
      >>> tx = equal(reduction="mean")
      >>> print(tx.update(jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(None))[0])
      [0.5 1.5]
    """
    check_choice("reduction", reduction, ("sum", "mean"))

    def update(grads, state, step):
        if reduction == "mean":
            count = jnp.maximum(jnp.sum(step.present), 1)
            grads = grads.scale(jnp.full(len(grads.tasks), 1.0) / count)
        return grads.combine(), state

    return balancer("equal", lambda params: optax.EmptyState(), update)
