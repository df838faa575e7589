"""FairGrad: the direction of alpha-fair improvements."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import balancer, keep_absent, masked_gramian
from mtjax.balancing.solvers import Info, fair_equilibrium, in_units


class FairGradState(NamedTuple):
    """State of `fair_grad`.

    Attributes:
      shares: `(tasks,)` float32, latest weights of the unit gradients.
    """

    shares: Array


def fair_grad(
    num_tasks: int, *, alpha: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Shares out the improvement among the tasks as alpha-fairness asks.

    :math:`d = \sum_t w_t g_t` with :math:`w > 0` such that
    :math:`G G^\top w = w^{-1/\alpha}`: the direction within a ball that maximises
    :math:`\sum_t \langle g_t, d \rangle^{1 - \alpha} / (1 - \alpha)`. With
    :math:`\alpha = 1` it is `nash_mtl` before clipping; larger values care more for the
    task that improves least, values near zero for the sum. If all losses are multiplied
    by c, the direction is by the power :math:`(1 - \alpha) / (1 + \alpha)` of c.

    Args:
      num_tasks: number of tasks.
      alpha: :math:`\alpha > 0`.

    Returns:
      A balancer whose state starts the next solve. Zero gradients count as absent.
      Where no direction improves all tasks there is no solution, and the update is what
      the solver got to.

    Raises:
      ValueError: if `alpha` is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = fair_grad(2, alpha=2.0)
      >>> grads = jnp.array([[8.0, 0.0], [0.0, 1.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [0.5 1. ]

    References:
      Fair Resource Allocation in Multi-Task Learning, 2024, equation 4. Solved by
      Newton's method on the convex function whose stationary point it is; the public
      code calls a least-squares solver, and multiplies the losses by :math:`w`, so that
      its heads are weighted too. Here, as in all methods on gradients, they are not.
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"`alpha` must be positive and finite, got {alpha}.")

    def init(params):
        del params
        return FairGradState(jnp.ones(num_tasks, jnp.float32))

    def update(grads, state, step):
        gramian = masked_gramian(grads, step)
        norms = jnp.sqrt(jnp.diagonal(gramian))
        weights, _ = fair_weights(gramian, alpha=alpha, shares=state.shares)
        shares = weights * norms
        # A Gramian that overflowed must show in the update, not stay in the state.
        kept = (shares > 0) & jnp.isfinite(shares)
        shares = keep_absent(shares, state.shares, kept)
        return grads.combine(weights), FairGradState(shares)

    return balancer("fair_grad", init, update, num_tasks=num_tasks)


def fair_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    alpha: float = 1.0,
    shares: Float[Array, " tasks"] | None = None,
) -> tuple[Float[Array, " tasks"], Info]:
    r"""Solves :math:`G G^\top w = w^{-1/\alpha}`.

    Args:
      gramian: inner products of the tasks' gradients.
      alpha: :math:`\alpha > 0`.
      shares: weights of the unit gradients in a similar problem, to start from.

    Returns:
      The weights, zero on zero gradients, and how well they solve the equation.
    """
    matrix, units, active = in_units(gramian)
    power = 1.0 / alpha
    # With b = w times units: C b = units^(power - 1) b^-power, but for a factor.
    log_units = jnp.log(units)
    log_rates = (power - 1.0) * log_units
    top = jnp.max(jnp.where(active, log_rates, -jnp.inf))
    top = jnp.where(jnp.any(active), top, 0.0)
    log_rates = jnp.where(active, log_rates - top, 0.0)
    if shares is None:
        shares = jnp.ones_like(units)
    start = jnp.where(active, shares, 1.0) / jnp.sqrt(jnp.diagonal(matrix))
    beta, info = fair_equilibrium(matrix, start, log_rates=log_rates, power=power)
    # Units, factor and powers in one exponent: each alone might overflow.
    log_weights = jnp.log(beta) + top / (1.0 + power) - log_units
    return jnp.where(active, jnp.exp(log_weights), 0.0), info
