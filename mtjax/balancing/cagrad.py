"""CAGrad: conflict-averse gradient descent."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import gramian_balancer
from mtjax.balancing.solvers import (
    RIDGE,
    Info,
    bounded_qp,
    full_precision,
    in_units,
    info_of,
)
from mtjax.balancing.twofold import product, residual, two_sum

# Newton steps beyond one for each task, which may be of a different power of ten.
_STEPS = 16

# Below what a direction that is up to twice as long as the mean gradient can do to a
# task. To allow for more would only coarsen the solver's tolerance for the others.
_LARGEST_HARM = -4.0


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
      solution is the projection of :math:`g_0` onto the directions that improve every
      task by :math:`\nu`, as in `dualproj` for :math:`\nu = 0`; Newton steps find the
      :math:`\nu` whose projection lies on the ball. Where no direction improves all
      tasks and that of `dualproj` lies inside the ball, it is taken.
    """
    divisor = check_ball(c, rescale)

    def weigh(gramian, step):
        weights, _ = conflict_averse_weights(gramian, step.present, c)
        return weights / divisor

    return gramian_balancer("cagrad", weigh)


def check_ball(c: float, rescale: int) -> float:
    """What the direction is divided by; ValueError if an argument is out of range."""
    if c < 0:
        raise ValueError(f"`c` must not be negative, got {c}.")
    if rescale not in (0, 1, 2):
        raise ValueError(f"`rescale` must be 0, 1 or 2, got {rescale}.")
    return (1.0, 1.0 + c**2, 1.0 + c)[rescale]


@full_precision
def conflict_averse_weights(
    gramian: Float[Array, "tasks tasks"],
    present: Bool[Array, " tasks"],
    c: float,
    selection: Float[Array, ""] | None = None,
) -> tuple[Float[Array, " tasks"], Info]:
    """Weights of the direction, before rescaling.

    Args:
      gramian: inner products of the tasks' gradients, zero for absent tasks.
      present: which tasks count in the mean gradient.
      c: radius of the ball relative to the mean gradient.
      selection: radius for which the correction is found before it is stretched to
        `c`; `c` if not given.

    Returns:
      The weights: one over the number of tasks, plus those of the correction. And how
      far that is from optimal and from its radius, relative to the mean gradient; it
      may be shorter where no direction improves all tasks.
    """
    selection = jnp.float32(c) if selection is None else selection
    mean = present / jnp.maximum(jnp.sum(present), 1)
    matrix, units, active = in_units(gramian)
    # In units of the largest gradient, so that no square overflows.
    units = jnp.where(active, units / jnp.max(jnp.where(active, units, 1e-30)), 1.0)
    shares = mean * units * active
    gain, gain_rest = product(matrix, shares)  # <g_t, g_0> / unit
    square = shares @ gain  # |g_0|^2
    nonzero = (square > 0) & (selection > 0)
    mean_norm = jnp.sqrt(jnp.where(nonzero, square, 1.0))
    # From here on in units of the mean gradient, again a power of two.
    scale = jnp.ldexp(jnp.ones(()), jnp.frexp(mean_norm)[1])
    gain, gain_rest = gain / scale, gain_rest / scale
    radius = jnp.where(nonzero, selection, 1.0) * (mean_norm / scale)
    inverse = jnp.min(jnp.where(active, units, jnp.inf)) / units
    inverse = jnp.where(active, inverse, 0.0)
    zeros = jnp.zeros_like(units)

    def length(x):
        # Of a sum that cancels: not less than float32 can tell from zero.
        return jnp.sqrt(jnp.maximum(x @ product(matrix, x)[0], RIDGE * x @ x))

    def newton(carry):
        margin, start, harmless, _, count, solves, _ = carry
        # The shortest correction after which every task improves by the margin. With a
        # margin of zero it always exists, but rounding might hide that: hence the ridge
        # on the first, which only says where to go from there.
        wanted = jnp.maximum(margin * inverse, _LARGEST_HARM)
        linear, rest = two_sum(gain, -wanted)
        rest = rest + gain_rest
        is_first = count == 0
        x, info = bounded_qp(
            matrix,
            linear,
            zeros,
            active,
            start,
            ridge=jnp.where(is_first & active, RIDGE, 0.0),
            linear_rest=rest,
        )
        size = length(x)
        # The length is convex in the margin: steps from above stay above. As a bound by
        # duality the next margin is valid even if there is no correction for this one.
        slack = x @ (residual(-linear, matrix, x, zeros) - rest)
        total = x @ inverse
        step = (size * (size - radius) + slack) / jnp.where(total > 0, total, 1.0)
        lower = margin - step
        arrived = (size <= radius * (1.0 + 1e-6)) | ~(lower < margin)
        done = ~is_first & (arrived | (info.kkt_residual > 1e-3))
        lower = jnp.where(is_first & (size < radius), highest, lower)
        harmless = jnp.where(is_first, x, harmless)
        solves = solves + info.iterations
        return lower, x, harmless, info.kkt_residual, count + 1, solves, done

    # No correction improves a task by more than one along its gradient alone.
    alone = gain + radius * jnp.sqrt(jnp.diagonal(matrix))
    alone = jnp.where(active, alone / jnp.where(active, inverse, 1.0), jnp.inf)
    highest, none = jnp.min(alone), jnp.array(0)
    begin = jnp.zeros(()), zeros, zeros, jnp.zeros(()), none, none, jnp.array(False)
    _, x, harmless, missed, _, solves, _ = jax.lax.while_loop(
        lambda carry: ~carry[-1] & (carry[-3] < len(units) + _STEPS), newton, begin
    )
    size = length(x)
    exists = (missed <= 1e-3) & (size <= 1.01 * radius) | ~(length(harmless) < radius)
    x = jnp.where(exists, x, harmless)
    size = length(x)
    missed = jnp.maximum(missed, jnp.abs(size - radius))
    ratio = c / jnp.where(nonzero, selection, 1.0)
    stretch = ratio * scale * jnp.minimum(1.0, radius / jnp.where(size > 0, size, 1.0))
    weights = jnp.where(nonzero, stretch * x / units, 0.0)
    info = info_of(jnp.where(nonzero, missed, 0.0), solves)
    return jnp.where(active, mean + weights, 0.0), info
