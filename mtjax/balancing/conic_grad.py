"""ConicGrad: the best direction within an angle of the mean gradient."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import gramian_balancer
from mtjax.balancing.solvers import full_precision, in_units, shortest_in_hull

# Halvings of a bracket of at most 90 natural logarithms, down to float32's precision.
_BISECTIONS = 28

# What float32 leaves of a sum of vectors that cancel, relative to them.
_ROUNDING = 5e-3


def conic_grad(*, c: float = 0.5) -> optax.GradientTransformationExtraArgs:
    r"""Maximises the worst task's improvement within a cone around the mean gradient.

    :math:`d = \arg\max_d \min_t \langle g_t, d \rangle` subject to
    :math:`\langle d, g_0 \rangle \ge c \|d\| \|g_0\|` and
    :math:`\|d\| = \|g_0\|`, where :math:`g_0` is the mean gradient. Unlike in `cagrad`,
    its length plays no part in how far the direction may turn from it.

    Args:
      c: least cosine of the direction with the mean gradient, in [0, 1); the larger the
        narrower is the cone.

    Returns:
      A balancer without state. A task whose gradient is zero counts in the mean, but
      its improvement, which is zero whatever the direction, does not.

    Raises:
      ValueError: if `c` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> tx = conic_grad(c=0.5)
      >>> grads = jnp.array([[4.0, 0.0], [0.0, 4.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [2. 2.]

    References:
      Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone, 2025: the
      constrained problem of its ConicGrad, solved to optimality, where its algorithm
      moves the weights of the dual problem by steps. The solution is parallel to that
      of `mgda` for the gradients :math:`g_t + \rho g_0` with the least
      :math:`\rho \ge 0` for which that lies in the cone; it is found by bisection. The
      paper tunes `c` to the data; one half is this library's choice.
    """
    if not 0.0 <= c < 1.0:
        raise ValueError(f"`c` must be in [0, 1), got {c}.")
    return gramian_balancer(
        "conic_grad", lambda gramian, step: conic_weights(gramian, step.present, c)
    )


@full_precision
def conic_weights(
    gramian: Float[Array, "tasks tasks"], present: Bool[Array, " tasks"], c: float
) -> Float[Array, " tasks"]:
    """Weights of the direction.

    Args:
      gramian: inner products of the tasks' gradients, zero for absent tasks.
      present: which tasks count in the mean gradient.
      c: least cosine with the mean gradient.

    Returns:
      Weights that are not negative; zero if the mean gradient is.
    """
    mean = present / jnp.maximum(jnp.sum(present), 1)
    matrix, units, active = in_units(gramian)
    # In units of the largest gradient, so that no square overflows.
    units = jnp.where(active, units / jnp.max(jnp.where(active, units, 1e-30)), 1.0)
    shares = mean * units * active
    gain = matrix @ shares  # <g_t, g_0> / |g_t|
    square = shares @ gain  # |g_0|^2
    nonzero = square > 0
    mean_norm = jnp.sqrt(jnp.where(nonzero, square, 1.0))
    lengths = jnp.sqrt(jnp.diagonal(matrix))
    mean_cosines = jnp.clip(gain / mean_norm, -lengths, lengths)

    def turned(shift, start):
        """Weights of the g_w nearest to - shift u_0, its parts, its largest summand."""
        # Of a_t u_t + b_t u_0, which are g_t + shift u_0 in other units.
        a, b = units / (units + shift), shift / (units + shift)
        mixed = jnp.outer(a * mean_cosines, b)
        shifted = jnp.outer(a, a) * matrix + mixed + mixed.T + jnp.outer(b, b)
        weights, _ = shortest_in_hull(shifted, units + shift, active, start)
        y = weights * units
        # The largest entry is taken out of the squares, which might underflow.
        top = jnp.maximum(jnp.max(y), 1e-30)
        ratios = y / top
        along = ratios @ mean_cosines
        across = jnp.sqrt(jnp.maximum(ratios @ matrix @ ratios - along**2, 0.0))
        return weights, top * along, top * across, top

    sine = (1.0 - c**2) ** 0.5

    def is_in_cone(shift, along, across, largest):
        exists = jnp.hypot(along + shift, across) > _ROUNDING * (largest + shift)
        return exists & (sine * (along + shift) >= c * across)

    def halve(_, carry):
        low, high, start = carry
        middle = 0.5 * (low + high)
        weights, *parts = turned(jnp.exp(middle), start)
        inside = is_in_cone(jnp.exp(middle), *parts)
        low, high = jnp.where(inside, low, middle), jnp.where(inside, middle, high)
        return low, high, weights

    shortest = jnp.log(jnp.min(jnp.where(active, units, 1.0)))
    # In units of the largest gradient no sum is farther from the cone than this.
    widest = jnp.log(2.0 * (1.0 + c / sine))
    zeros = jnp.zeros_like(units)
    carry = (shortest - 12.0, widest, zeros)
    _, high, start = jax.lax.fori_loop(0, _BISECTIONS, halve, carry)
    # The shortest vector itself, if it lies in the cone.
    _, *parts = turned(jnp.zeros(()), zeros)
    shift = jnp.where(is_in_cone(0.0, *parts), 0.0, jnp.exp(high))
    weights, along, across, _ = turned(shift, start)
    length = jnp.hypot(along + shift, across)
    stretch = mean_norm / jnp.where(length > 0, length, 1.0)
    weights = stretch * (weights + shift * mean / mean_norm)
    return jnp.where(active & nonzero & (length > 0), weights, 0.0)
