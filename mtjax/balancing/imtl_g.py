"""IMTL-G: impartial multi-task learning of gradients."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import gramian_balancer
from mtjax.balancing.cosines import cosines
from mtjax.balancing.solvers import RIDGE, full_precision

# Weights stay below its inverse, about, where the sum that they are divided by cancels.
_SMALLEST_SUM = 1e-4


def imtl_g() -> optax.GradientTransformationExtraArgs:
    r"""Goes the same way along every task's unit gradient.

    :math:`d = \sum_t \alpha_t g_t` with :math:`\sum_t \alpha_t = 1` and the same
    :math:`\langle d, g_t / \|g_t\| \rangle` for all tasks. In terms of the cosines
    :math:`C` of the gradients, :math:`\alpha_t \propto (C^{-1} 1)_t / \|g_t\|`.

    Weights may be negative, and so may the common projection be: with gradients of
    very different lengths at sharp angles the direction makes all losses worse. At
    Pareto-stationary points it is zero.

    Returns:
      A balancer without state. Tasks whose gradients are zero count as absent.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = imtl_g()
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [0.75 0.75]

    References:
      Towards Impartial Multi-task Learning, 2021, equation 7, in a form without a
      distinguished first task. Where it has no unique solution (dependent gradients),
      a ridge on the cosines picks one; where it has none because the weights would sum
      to zero, they are bounded and sum to less than one.
    """
    return gramian_balancer("imtl_g", lambda g, step: equal_projection_weights(g))


@full_precision
def equal_projection_weights(
    gramian: Float[Array, "tasks tasks"],
) -> Float[Array, " tasks"]:
    """Weights of the direction that has the same inner product with all unit gradients.

    Args:
      gramian: inner products of the tasks' gradients.

    Returns:
      Weights of any sign that sum to one, zero on zero gradients.
    """
    matrix, norms, active = cosines(gramian)
    ridged = matrix + RIDGE * jnp.eye(len(norms), dtype=gramian.dtype)
    unit_weights = jnp.linalg.solve(ridged, jnp.ones_like(norms))
    shortest = jnp.min(jnp.where(active, norms, jnp.inf))
    weights = jnp.where(active, unit_weights * (shortest / norms), 0.0)
    total, size = jnp.sum(weights), jnp.sum(jnp.abs(weights))
    bounded = jnp.maximum(jnp.abs(total), _SMALLEST_SUM * size)
    return weights / jnp.where(size > 0, jnp.where(total < 0, -bounded, bounded), 1.0)
