"""Small solvers on the Gramian that run on the device, inside `jit`.

All work on unit-norm gradients: the `(tasks, tasks)` matrix of cosines has the same
entries whatever the scale of the losses, so no tolerance depends on it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Added to the diagonal of the cosines: above the rounding error of float32 products,
# so that linearly dependent gradients do not make a linear system singular.
RIDGE = 1e-6

# Without it GPUs and TPUs would round the inputs of matrix products to fewer bits, by
# which the solvers lose their way. A decorator of what multiplies matrices.
full_precision = jax.default_matmul_precision("highest")


class Cosines(NamedTuple):
    """The Gramian in terms of directions and lengths.

    Attributes:
      matrix: `(tasks, tasks)` cosines; rows of the identity for inactive tasks.
      norms: `(tasks,)` gradient norms; 1 for inactive tasks.
      active: `(tasks,)` False where the gradient is zero or the task absent.
    """

    matrix: Array
    norms: Array
    active: Array


def cosines(gramian: Float[Array, "tasks tasks"]) -> Cosines:
    """Splits a Gramian into cosines and norms."""
    squares = jnp.diagonal(gramian)
    active = squares > 0
    norms = jnp.sqrt(jnp.where(active, squares, 1.0))
    matrix = gramian / norms[:, None] / norms[None, :]
    both = active[:, None] & active[None, :]
    eye = jnp.eye(len(norms), dtype=gramian.dtype)
    off_diagonal = jnp.where(both, jnp.clip(matrix, -1.0, 1.0), 0.0) * (1.0 - eye)
    return Cosines(off_diagonal + eye, norms, active)


@full_precision
def nonnegative_qp(
    matrix: Float[Array, "tasks tasks"],
    linear: Float[Array, " tasks"],
    allowed: Bool[Array, " tasks"],
    start: Bool[Array, " tasks"] | None = None,
) -> tuple[Float[Array, " tasks"], Bool[Array, " tasks"]]:
    r"""Minimises :math:`\tfrac12 x^\top A x + b^\top x` over :math:`x \ge 0`.

    An active-set method: exact up to rounding, in about as many steps as there are
    positive entries, each the solution of one small linear system.

    Args:
      matrix: :math:`A`, positive semidefinite, with a unit diagonal.
      linear: :math:`b`.
      allowed: entries that may become positive.
      start: the entries that are positive at the solution of a similar problem.

    Returns:
      :math:`x`, and which entries are positive.

    References:
      Lawson and Hanson, Solving Least Squares Problems, 1974, algorithm 23.10.
    """
    size = len(linear)
    eye = jnp.eye(size, dtype=matrix.dtype)
    ridged = matrix + RIDGE * eye
    tolerance = 1e-6 * jnp.max(jnp.abs(linear))

    def solve(free):
        system = jnp.where(free[:, None] & free[None, :], ridged, eye)
        return jnp.linalg.solve(system, jnp.where(free, -linear, 0.0))

    def step(carry):
        x, free, _, count = carry
        target = solve(free)
        crossing = free & (target <= 0)
        # Walk to the target, or to the first bound that is met on the way.
        fraction = jnp.where(
            crossing, x / jnp.where(crossing, x - target, 1.0), jnp.inf
        )
        fraction = jnp.where(jnp.isnan(fraction), 0.0, fraction)
        blocked = jnp.any(crossing)
        first = jnp.argmin(fraction)
        walked = x + fraction[first] * (target - x)
        stays = free & (jnp.arange(size) != first) & ~(crossing & (walked <= 0))
        # At the target: free the entry whose increase lowers the objective most.
        slope = jnp.where(allowed & ~free, ridged @ target + linear, jnp.inf)
        best = jnp.argmin(slope)
        grows = slope[best] < -tolerance
        enlarged = free | (grows & (jnp.arange(size) == best))
        x = jnp.where(blocked, jnp.where(stays, walked, 0.0), target)
        free = jnp.where(blocked, stays, enlarged)
        return x, free, ~blocked & ~grows, count + 1

    def unfinished(carry):
        _, _, done, count = carry
        return ~done & (count < 4 * size + 8)

    free = jnp.zeros(size, bool) if start is None else start & allowed
    carry = (jnp.zeros_like(linear), free, jnp.array(False), jnp.array(0))
    x, free, _, _ = jax.lax.while_loop(unfinished, step, carry)
    return jnp.maximum(x, 0.0), free


def shortest_in_hull(
    matrix: Float[Array, "tasks tasks"],
    units: Float[Array, " tasks"],
    allowed: Bool[Array, " tasks"],
    start: Bool[Array, " tasks"] | None = None,
) -> tuple[Float[Array, " tasks"], Bool[Array, " tasks"]]:
    """Weights of the shortest vector in the convex hull of some vectors.

    Args:
      matrix: inner products of the vectors, each divided by its unit.
      units: positive, about the vectors' lengths.
      allowed: vectors that may have a weight.
      start: the vectors that have one at the solution of a similar problem.

    Returns:
      Weights that are not negative and sum to one (to zero if no vector is allowed),
      and which are positive.
    """
    # The shortest vector in the hull is, up to its length, the one of least norm whose
    # inner product with every vector is at least one.
    shortest = jnp.min(jnp.where(allowed, units, jnp.inf))
    inverse = jnp.where(allowed, shortest / units, 0.0)
    x, free = nonnegative_qp(matrix, -inverse, allowed, start)
    weights = x * inverse
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1.0), free


@full_precision
def nash_equilibrium(
    matrix: Float[Array, "tasks tasks"],
    start: Float[Array, " tasks"],
    *,
    max_steps: int = 100,
    tolerance: float = 1e-5,
) -> Float[Array, " tasks"]:
    r"""Solves :math:`C \beta = 1 / \beta` for :math:`\beta > 0`.

    The damped Newton method on :math:`\tfrac12 \beta^\top C \beta - \sum \log \beta_t`,
    which is convex and self-concordant: no step leaves the positive orthant.

    Args:
      matrix: :math:`C`, positive semidefinite, with a unit diagonal.
      start: positive starting point, used if it is better than equal entries.
      max_steps: bound on the Newton steps.
      tolerance: stops when the Newton decrement is below it.

    Returns:
      :math:`\beta`.
    """
    ridged = matrix + RIDGE * jnp.eye(len(start), dtype=matrix.dtype)

    def best_multiple(beta):
        beta = beta / jnp.max(beta)
        return beta * jnp.sqrt(len(beta) / (beta @ ridged @ beta))

    # Newton steps from afar are tiny, and last step's solution may be far away.
    start, ones = best_multiple(start), best_multiple(jnp.ones_like(start))
    closer = jnp.sum(jnp.log(start)) > jnp.sum(jnp.log(ones))
    start = jnp.where(closer, start, ones)

    def step(carry):
        beta, _, count = carry
        slope = ridged @ beta - 1.0 / beta
        # In the variable log(beta) the system has a diagonal of at least one.
        hessian = ridged * jnp.outer(beta, beta) + jnp.eye(len(beta), dtype=beta.dtype)
        relative = jnp.linalg.solve(hessian, slope * beta)
        decrement = jnp.sqrt(jnp.maximum(relative @ (slope * beta), 0.0))
        damping = jnp.where(decrement < 0.25, 1.0, 1.0 / (1.0 + decrement))
        return beta * (1.0 - damping * relative), decrement, count + 1

    def unfinished(carry):
        _, decrement, count = carry
        return (decrement > tolerance) & (count < max_steps)

    carry = (start, jnp.array(jnp.inf, start.dtype), jnp.array(0))
    return jax.lax.while_loop(unfinished, step, carry)[0]
