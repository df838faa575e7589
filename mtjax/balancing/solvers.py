r"""Small solvers on the Gramian that run on the device, inside `jit`.

All take the Gramian in units about as long as the gradients, so that no tolerance
depends on the scale of the losses. The units are powers of two, and residuals are
summed to more than float32's digits: what is solved is the given Gramian's problem, not
a rounded one. Every solver returns its solution and an `Info`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtjax.balancing.twofold import residual, two_sum

# Added to the diagonal in units of the gradients' lengths: above the rounding error of
# a float32 Gramian, so that linearly dependent gradients do not make a system singular.
# It only damps the steps to a solution, which is free of it where there is one.
RIDGE = 1e-6

# Steps of refinement; each divides the ridge's bias along an eigenvector of eigenvalue
# v by 1 + v / RIDGE.
_REFINEMENTS = 4

# Exchanges of whole blocks of entries before entries move one by one.
_EXCHANGES = 10

# Weights of unit gradients beyond which float32 cannot tell a direction that improves
# all tasks from none.
_LARGEST_SHARE = 1e3

# Without it GPUs and TPUs would round the inputs of matrix products to fewer bits, by
# which the solvers lose their way. A decorator of what multiplies matrices.
full_precision = jax.default_matmul_precision("highest")


class Info(NamedTuple):
    """How well a solver did.

    Attributes:
      kkt_residual: `()` float32, by how much the optimality conditions are violated,
        relative to the terms in them, or what the last Newton step changed.
      iterations: `()` int32, linear systems solved.
      converged: `()` bool, whether the residual is below 1e-5. It is False where the
        problem has no solution, as for Nash-MTL at Pareto-stationary points.
    """

    kkt_residual: Array
    iterations: Array
    converged: Array


def info_of(kkt_residual: Float[Array, ""], iterations: Int[Array, ""]) -> Info:
    """Says whether what is violated is little."""
    return Info(kkt_residual, iterations, kkt_residual <= 1e-5)


class Scaled(NamedTuple):
    """The Gramian in units of the gradients' lengths.

    Attributes:
      matrix: `(tasks, tasks)` the Gramian divided by both units; rows of the identity
        for inactive tasks.
      units: `(tasks,)` powers of two, so that dividing by them rounds nothing; 1 for
        inactive tasks.
      active: `(tasks,)` False where the gradient is zero or the task absent.
    """

    matrix: Array
    units: Array
    active: Array


def in_units(
    gramian: Float[Array, "tasks tasks"], ridge: Float[Array, ""] | float = 0.0
) -> Scaled:
    """Brings the diagonal of a Gramian, with a ridge added, between one half and two.

    Args:
      gramian: inner products of the tasks' gradients.
      ridge: what will be added to its diagonal; not added here.

    Returns:
      The scaled Gramian.
    """
    squares = jnp.diagonal(gramian)
    active = squares > 0
    exponents = jnp.frexp(jnp.where(active, squares + ridge, 1.0))[1] // 2
    units = jnp.where(active, jnp.ldexp(jnp.ones_like(squares), exponents), 1.0)
    both = active[:, None] & active[None, :]
    matrix = gramian / units[:, None] / units[None, :]
    return Scaled(
        jnp.where(both, matrix, jnp.eye(len(units), dtype=gramian.dtype)), units, active
    )


@full_precision
def bounded_qp(
    matrix: Float[Array, "tasks tasks"],
    linear: Float[Array, " tasks"],
    lower: Float[Array, " tasks"],
    allowed: Bool[Array, " tasks"],
    start: Float[Array, " tasks"] | None = None,
    *,
    ridge: Float[Array, " tasks"] | float = 0.0,
    linear_rest: Float[Array, " tasks"] | float = 0.0,
) -> tuple[Float[Array, " tasks"], Info]:
    r"""Minimises :math:`\tfrac12 x^\top A x + b^\top x` over :math:`x \ge l`.

    An active-set method, exact up to rounding. A few exchanges of all entries on the
    wrong side at once find the set that is above its bounds, as a rule; single ones,
    which always come to an end, start from there. A step is one small linear system.

    Args:
      matrix: :math:`A` without `ridge`, positive semidefinite, the diagonal about one.
      linear: :math:`b`.
      lower: :math:`l`.
      allowed: entries that may leave their bound.
      start: the solution of a similar problem; what is above its bound there is tried
        first here.
      ridge: what the problem adds to the diagonal of :math:`A`.
      linear_rest: what rounding took from :math:`b`.

    Returns:
      :math:`x`, and how well it fulfils the optimality conditions relative to the slope
      at :math:`l`.

    References:
      Lawson and Hanson, Solving Least Squares Problems, 1974, algorithm 23.10, after
      the exchanges of Portugal, Judice and Vicente, A comparison of block pivoting and
      interior-point algorithms for linear least squares problems with nonnegative
      variables, 1994.
    """
    size = len(linear)
    eye = jnp.eye(size, dtype=matrix.dtype)
    whole, rest = two_sum(jnp.diagonal(matrix), jnp.broadcast_to(ridge, size))
    matrix = jnp.where(eye > 0, whole[:, None], matrix)
    ridged = matrix + RIDGE * eye

    def downhill(x, x_rest):
        return residual(-linear, matrix, x, x_rest) - rest * x - linear_rest

    def solve(free):
        system = jnp.where(free[:, None] & free[None, :], ridged, eye)
        factors = jax.scipy.linalg.lu_factor(system)

        def refine(_, carry):
            x, x_rest = carry
            error = jnp.where(free, downhill(x, x_rest), 0.0)
            return two_sum(x, x_rest + jax.scipy.linalg.lu_solve(factors, error))

        begin = jnp.where(free, 0.0, lower), jnp.zeros_like(lower)
        x, x_rest = jax.lax.fori_loop(0, _REFINEMENTS, refine, begin)
        return x, downhill(x, x_rest)

    corner = downhill(lower, jnp.zeros_like(lower))
    scale = jnp.max(jnp.abs(corner), where=allowed, initial=0.0)

    def exchange(carry):
        free, _, count = carry
        # To single precision: what is missed here is found below.
        system = jnp.where(free[:, None] & free[None, :], ridged, eye)
        bound = jnp.where(free, 0.0, lower)
        rhs = jnp.where(free, -linear - matrix @ bound, 0.0)
        target = bound + jnp.linalg.solve(system, rhs)
        force = -linear - matrix @ target
        wrong = jnp.where(free, target < lower, allowed & (force > 1e-6 * scale))
        return free ^ wrong, jnp.any(wrong), count + 1

    def step(carry):
        x, free, _, count, _ = carry
        target, force = solve(free)
        crossing = free & (target <= lower)
        # Walk to the target, or to the first bound that is met on the way.
        fraction = jnp.where(
            crossing, (x - lower) / jnp.where(crossing, x - target, 1.0), jnp.inf
        )
        fraction = jnp.where(jnp.isnan(fraction), 0.0, fraction)
        blocked = jnp.any(crossing)
        first = jnp.argmin(fraction)
        walked = x + fraction[first] * (target - x)
        stays = free & (jnp.arange(size) != first) & ~(crossing & (walked <= lower))
        # At the target: free the entry whose increase lowers the objective most.
        missed = jnp.max(jnp.where(free, jnp.abs(force), 0.0))
        gain = jnp.where(allowed & ~free, force, -jnp.inf)
        best = jnp.argmax(gain)
        grows = gain[best] > missed + 1e-8 * scale
        enlarged = free | (grows & (jnp.arange(size) == best))
        violation = jnp.maximum(missed, jnp.maximum(gain[best], 0.0))
        x = jnp.where(blocked, jnp.where(stays, walked, lower), target)
        free = jnp.where(blocked, stays, enlarged)
        return x, free, ~blocked & ~grows, count + 1, violation

    def unfinished(carry):
        _, _, done, count, _ = carry
        return ~done & (count < 4 * size + 8)

    free = allowed & (corner > 0 if start is None else start > lower)
    free, _, exchanges = jax.lax.while_loop(
        lambda carry: carry[1] & (carry[2] < _EXCHANGES),
        exchange,
        (free, jnp.array(True), jnp.array(0)),
    )
    carry = (lower, free, jnp.array(False), jnp.array(0), jnp.array(jnp.inf))
    x, _, done, count, violation = jax.lax.while_loop(unfinished, step, carry)
    violation = jnp.where(done, violation, jnp.inf)
    relative = violation / jnp.where(scale > 0, scale, 1.0)
    # Comparisons with NaN end the search as if there were nothing to gain.
    x = jnp.where(jnp.isnan(relative), jnp.nan, jnp.maximum(x, lower))
    return x, info_of(relative, exchanges + count)


@full_precision
def shortest_in_hull(
    matrix: Float[Array, "tasks tasks"],
    units: Float[Array, " tasks"],
    allowed: Bool[Array, " tasks"],
    start: Float[Array, " tasks"] | None = None,
) -> tuple[Float[Array, " tasks"], Info]:
    """Weights of the shortest vector in the convex hull of some vectors.

    Args:
      matrix: inner products of the vectors, each divided by its unit.
      units: positive, about the vectors' lengths.
      allowed: vectors that may have a weight.
      start: the weights of a similar problem.

    Returns:
      Weights that are not negative and sum to one (to zero if no vector is allowed),
      and how much shorter the vector might be relative to the shortest of the vectors.
    """
    # The shortest vector in the hull is, up to its length, the one of least norm whose
    # inner product with every vector is at least one.
    shortest = jnp.min(jnp.where(allowed, units, jnp.inf))
    inverse = jnp.where(allowed, shortest / units, 0.0)
    zeros = jnp.zeros_like(units)
    x, info = bounded_qp(matrix, -inverse, zeros, allowed, start)
    weights = x * inverse
    total = jnp.sum(weights)
    total = jnp.where(total > 0, total, 1.0)
    shares = x / total
    products = -residual(zeros, matrix, shares, zeros)
    missing = jnp.where(allowed, inverse * (shares @ products) - products, 0.0)
    return weights / total, info_of(jnp.max(jnp.maximum(missing, 0.0)), info.iterations)


@full_precision
def fair_equilibrium(
    matrix: Float[Array, "tasks tasks"],
    start: Float[Array, " tasks"],
    *,
    log_rates: Float[Array, " tasks"] | float = 0.0,
    power: float = 1.0,
    max_steps: int = 300,
    tolerance: float = 1e-5,
) -> tuple[Float[Array, " tasks"], Info]:
    r"""Solves :math:`C \beta = a \beta^{-p}` for :math:`\beta > 0`.

    The damped Newton method on the convex function whose slope is the difference of the
    two sides, for :math:`p = 1` :math:`\tfrac12 \beta^\top C \beta - \sum a_t \log
    \beta_t`. No step leaves the positive orthant. It stops early where no direction
    improves all tasks, and there is no solution.

    Args:
      matrix: :math:`C`, positive semidefinite, the diagonal about one.
      start: positive starting point, used if it is better than the solution for
        orthogonal gradients.
      log_rates: :math:`\log a`, none above zero.
      power: :math:`p > 0`; 1 is the Nash bargaining solution.
      max_steps: bound on the Newton steps.
      tolerance: stops when a Newton step is below it, relative to :math:`\beta`, both
        measured by the second derivatives.

    Returns:
      :math:`\beta`, and that measure of the last step, which is more than what is
      missing. The two sides cannot tell it: where gradients nearly cancel, rounding a
      right solution moves them apart.
    """
    size = len(start)
    eye = jnp.eye(size, dtype=matrix.dtype)
    log_rates = jnp.broadcast_to(log_rates, size)
    zeros = jnp.zeros_like(start)
    caution = max(1.0, 0.5 * (power + 1.0))

    def pull(beta):
        return jnp.exp(log_rates - power * jnp.log(beta))

    def best_multiple(beta):
        beta = beta / jnp.max(beta)
        square = jnp.maximum(beta @ matrix @ beta, RIDGE * beta @ beta)
        return beta * (beta @ pull(beta) / square) ** (1.0 / (1.0 + power))

    def potential(beta):
        log_beta = jnp.log(beta)
        if power == 1.0:
            barrier = jnp.exp(log_rates) * log_beta
        else:
            barrier = jnp.exp(log_rates + (1.0 - power) * log_beta) / (1.0 - power)
        return 0.5 * beta @ matrix @ beta - jnp.sum(barrier)

    # Newton steps from afar are tiny, and last step's solution may be far away.
    start = best_multiple(start)
    orthogonal = best_multiple(jnp.exp(log_rates / (1.0 + power)))
    start = jnp.where(potential(start) < potential(orthogonal), start, orthogonal)

    def step(carry):
        beta, _, count = carry
        force = residual(pull(beta), matrix, beta, zeros)
        hessian = matrix + jnp.diag(power * pull(beta) / beta)
        # With a unit diagonal its condition does not suffer from entries of many sizes.
        unit = 1.0 / jnp.sqrt(jnp.diagonal(hessian))
        system = hessian * jnp.outer(unit, unit) + RIDGE * eye
        move = jnp.linalg.solve(system, force * unit)
        relative = move * unit / beta
        damping = 1.0 / (1.0 + caution * jnp.max(jnp.abs(relative)))
        square = jnp.maximum(move @ (force * unit), 0.0)
        change = jnp.sqrt(square / (beta @ pull(beta)))
        # Rounding must not make an entry zero that shrinks by many powers of ten.
        return beta * jnp.maximum(1.0 + damping * relative, 1e-7), change, count + 1

    def unfinished(carry):
        beta, change, count = carry
        inside = jnp.max(beta) < _LARGEST_SHARE
        return (change > tolerance) & (count < max_steps) & inside

    carry = (start, jnp.array(jnp.inf, start.dtype), jnp.array(0))
    beta, change, count = jax.lax.while_loop(unfinished, step, carry)
    return beta, info_of(change, count)
