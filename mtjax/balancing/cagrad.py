"""CAGrad: conflict-averse gradient descent."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import gramian_balancer
from mtjax.balancing.solvers import cosines, nonnegative_qp

# Halvings of the bracket: beyond float32's relative precision.
_BISECTIONS = 26


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
      >>> print(tx.update(grads, tx.init(None))[0])
      [0.75 0.75]

    References:
      Conflict-Averse Gradient Descent for Multi-task Learning, 2021, equation 4. Solved
      as a search for the worst improvement that is just within reach, rather than by
      its dual: every step of the search is a quadratic program with an exact solution.
    """
    if c < 0:
        raise ValueError(f"`c` must not be negative, got {c}.")
    if rescale not in (0, 1, 2):
        raise ValueError(f"`rescale` must be 0, 1 or 2, got {rescale}.")
    divisor = (1.0, 1.0 + c**2, 1.0 + c)[rescale]

    def weigh(gramian, step):
        return conflict_averse_weights(gramian, step.present, c) / divisor

    return gramian_balancer("cagrad", weigh)


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
    matrix, norms, active = cosines(gramian)
    largest = jnp.max(jnp.where(active, norms, 0.0))
    norms = jnp.where(active, norms / jnp.where(largest > 0, largest, 1.0), 1.0)
    # Everything below is in units of the largest gradient, per unit direction.
    mean = mean * norms * active
    gain = matrix @ mean  # <g_t, g_0> / |g_t|
    radius = c * jnp.sqrt(jnp.maximum(mean @ gain, 0.0))
    everyone = jnp.where(active, gain * norms, jnp.inf)
    low = jnp.min(everyone)
    high = jnp.min(jnp.where(active, everyone + radius * norms, jnp.inf))
    low, high = (jnp.where(jnp.isfinite(x), x, 0.0) for x in (low, high))

    def correction(level, free):
        """The shortest correction that gives every task an improvement of `level`."""
        x, free = nonnegative_qp(matrix, gain - level / norms, active, free)
        return x, jnp.sqrt(jnp.maximum(x @ matrix @ x, 0.0)), free

    def halve(_, carry):
        low, high, x, length, free = carry
        middle = 0.5 * (low + high)
        x_new, length_new, free = correction(middle, free)
        inside = length_new <= radius
        low, high = jnp.where(inside, middle, low), jnp.where(inside, high, middle)
        x = jnp.where(inside, x_new, x)
        return low, high, x, jnp.where(inside, length_new, length), free

    x, length, free = correction(high, jnp.zeros_like(active))
    carry = (low, high, x, length, free)
    _, _, x, length, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, carry)
    x = jnp.where(length > 0, x * radius / jnp.where(length > 0, length, 1.0), 0.0)
    return jnp.where(active, (mean + x) / norms, 0.0)
