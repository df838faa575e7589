"""CAGrad: conflict-averse gradient descent."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import gramian_balancer
from mtjax.balancing.solvers import RIDGE, full_precision, in_units, shortest_in_hull
from mtjax.balancing.twofold import residual

# Halvings of a bracket of 70 natural logarithms, down to float32's precision.
_BISECTIONS = 28


def cagrad(
    *, c: float = 0.5, rescale: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Maximises the worst task's improvement within a ball around the mean gradient.

    :math:`d = \arg\max_d \min_t \langle g_t, d \rangle` subject to
    :math:`\|d - g_0\| \le c \|g_0\|`, where :math:`g_0` is the mean gradient. With
    :math:`c < 1` it converges to a minimum of the mean loss.

    Args:
      c: radius of the ball, not negative; 0 gives the mean gradient.
      rescale: 0 leaves :math:`d` as it is, 1 divides it by :math:`1 + c^2`, 2 by
        :math:`1 + c`.

    Returns:
      A balancer without state. A task whose gradient is zero counts in the mean, but
      its improvement, which is zero whatever the direction, does not.

    Raises:
      ValueError: if `c` is negative or `rescale` not 0, 1 or 2.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = cagrad(c=0.5, rescale=0)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [0.75 0.75]

    References:
      Conflict-Averse Gradient Descent for Multi-task Learning, 2021, equation 4. Its
      solution is parallel to that of `mgda` for the gradients :math:`g_t + \rho g_0`;
      :math:`\rho` is found by bisection, every step of which has an exact solution.
    """
    if c < 0:
        raise ValueError(f"`c` must not be negative, got {c}.")
    if rescale not in (0, 1, 2):
        raise ValueError(f"`rescale` must be 0, 1 or 2, got {rescale}.")
    divisor = (1.0, 1.0 + c**2, 1.0 + c)[rescale]

    def weigh(gramian, step):
        return conflict_averse_weights(gramian, step.present, c) / divisor

    return gramian_balancer("cagrad", weigh)


@full_precision
def conflict_averse_weights(
    gramian: Float[Array, "tasks tasks"], present: Bool[Array, " tasks"], c: float
) -> Float[Array, " tasks"]:
    """Weights of the direction, before rescaling.

    Args:
      gramian: inner products of the tasks' gradients, zero for absent tasks.
      present: which tasks count in the mean gradient.
      c: radius of the ball relative to the mean gradient.

    Returns:
      The weights: one over the number of tasks, plus those of the correction.
    """
    mean = present / jnp.maximum(jnp.sum(present), 1)
    matrix, norms, active = in_units(gramian)
    # In units of the largest gradient, so that no square overflows.
    norms = jnp.where(active, norms / jnp.max(jnp.where(active, norms, 1e-30)), 1.0)
    gain = matrix @ (mean * norms * active)  # <g_t, g_0> / |g_t|
    square = (mean * norms * active) @ gain  # |g_0|^2
    nonzero = (square > 0) & (c > 0)
    mean_norm = jnp.sqrt(jnp.where(nonzero, square, 1.0))
    lengths = jnp.sqrt(jnp.diagonal(matrix))
    mean_cosines = jnp.clip(gain / mean_norm, -lengths, lengths)

    def correction(length, start):
        """Weights of the g_w that has this length, if any has, and its length."""
        # Of a_t u_t + b_t u_0, which are g_t + length / c u_0 in other units.
        units = c * norms + length
        a, b = c * norms / units, length / units
        mixed = jnp.outer(a * mean_cosines, b)
        shifted = jnp.outer(a, a) * matrix + mixed + mixed.T + jnp.outer(b, b)
        weights, _ = shortest_in_hull(shifted, units, active, start)
        y = weights * norms
        # The largest entry is taken out of the squares, which might underflow. The
        # length of a sum that cancels is not less than float32 can tell from zero.
        top = jnp.maximum(jnp.max(y), 1e-30)
        ratios = y / top
        zeros = jnp.zeros_like(ratios)
        square = -ratios @ residual(zeros, matrix, ratios, zeros)
        floor = RIDGE * ratios @ ratios
        return weights, top * jnp.sqrt(jnp.maximum(square, floor))

    def halve(_, carry):
        low, high, start = carry
        middle = 0.5 * (low + high)
        weights, length = correction(jnp.exp(middle), start)
        longer = length > jnp.exp(middle)
        low, high = jnp.where(longer, middle, low), jnp.where(longer, high, middle)
        return low, high, weights

    shortest = jnp.log(jnp.min(jnp.where(active, norms, 1.0)))
    # A gradient is up to the root of two of its unit long.
    carry = (shortest - 12.0, jnp.array(0.5), jnp.zeros_like(norms))
    _, high, start = jax.lax.fori_loop(0, _BISECTIONS, halve, carry)
    weights, length = correction(jnp.exp(high), start)
    stretch = c * mean_norm / jnp.where(length > 0, length, 1.0)
    weights = jnp.where(nonzero & (length > 0), stretch * weights, 0.0)
    return jnp.where(active, mean + weights, 0.0)
