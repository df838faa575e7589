"""PCD: priority-constrained descent."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float

from mtjax.balancing.balancer import (
    balancer,
    check_task,
    keep_absent,
    masked_gramian,
    place_of,
)
from mtjax.balancing.solvers import Info, bounded_qp, full_precision, in_units
from mtjax.balancing.twofold import product

# Multipliers of unit gradients beyond which float32 cannot tell constraints that are
# hard to fulfil together from those that cannot be.
_LARGEST_MULTIPLIER = 1e3

# What float32 leaves of the square of a sum that cancels, relative to its terms.
_ROUNDING = 1e-6


class PCDState(NamedTuple):
    """State of `pcd`.

    Attributes:
      squares: `(tasks,)` float32, moving averages of the squared gradient norms, biased
        towards zero.
      totals: `(tasks,)` float32, the same averages of ones: what to divide them by.
    """

    squares: Array
    totals: Array


def pcd(
    num_tasks: int,
    primary: str | int,
    *,
    tau: ArrayLike | Sequence[float] = 0.02,
    beta: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Follows one task as far as every other gets a fraction of its own progress.

    The direction is :math:`\tilde d` rescaled to the norm of the primary task's
    gradient :math:`g_1`, where

    .. math:: \tilde d = \arg\min_d \tfrac12 \|d - \tilde g_1\|^2 \quad \text{subject
              to} \quad \langle \tilde g_j, d \rangle \ge \tau_j \|\tilde g_j\|^2

    for all secondary tasks :math:`j`. The gradients are normalised over time,
    :math:`\tilde g_t = g_t / \sqrt{v_t + \epsilon}` with :math:`v_t` the mean of
    :math:`\|g_t\|^2` over the steps, the latest of which count most.

    Args:
      num_tasks: number of tasks.
      primary: the task that comes first, by name or by its place among the sorted
        names.
      tau: fraction in [0, 1] of the progress along its own normalised gradient that a
        secondary task is promised; or one for each of them, in the order of the names.
      beta: factor of the moving averages in [0, 1).
      eps: not negative. A loss may be multiplied by any positive number as long as its
        squared gradient norm stays well above this; below, its task is promised less.
        With 0 the units of the losses never matter: for gradients that may be tiny, as
        inside `mtjax.task_sam`.

    Returns:
      A balancer with state. Averages of absent tasks stay, and an absent task is
      promised nothing. The update of shared parameters is zero if the primary task is
      absent or its gradient zero, or if :math:`\tilde d` is; it is :math:`g_1` if the
      promises contradict each other, up to what float32 can tell.

    Raises:
      ValueError: if an argument is out of its range, or `primary` not one of the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = pcd(2, primary=0, tau=0.6)
      >>> grads = jnp.array([[5.0, 0.0], [0.0, 0.1]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [4.287 2.572]

    References:
      Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
      Multi-Objective Optimization, 2026. The dual problem is solved exactly; the
      multipliers of the promises are the weights of the secondary gradients.
    """
    check_task("primary", primary, num_tasks)
    fractions = np.asarray(tau, np.float32)
    if fractions.shape not in ((), (num_tasks - 1,)):
        raise ValueError(
            "`tau` must be a number or have one entry for each of the "
            f"{num_tasks - 1} secondary tasks, got shape {fractions.shape}."
        )
    if not np.all((fractions >= 0) & (fractions <= 1)):
        raise ValueError(f"`tau` must be in [0, 1], got {fractions.tolist()}.")
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"`beta` must be in [0, 1), got {beta}.")
    if not eps >= 0.0:
        raise ValueError(f"`eps` must not be negative, got {eps}.")

    def init(params):
        del params
        zeros = lambda: jnp.zeros(num_tasks, jnp.float32)
        return PCDState(zeros(), zeros())

    def update(grads, state, step):
        place = place_of("primary", primary, grads.tasks)
        gramian = masked_gramian(grads, step)
        squares = jnp.diagonal(gramian)
        average = lambda old, new: beta * old + (1.0 - beta) * new
        # A gradient that is not finite shows in the update alone.
        moves = step.present & jnp.isfinite(squares)
        state = PCDState(
            keep_absent(average(state.squares, squares), state.squares, moves),
            keep_absent(average(state.totals, 1.0), state.totals, moves),
        )
        means = state.squares / jnp.where(state.totals > 0, state.totals, 1.0) + eps
        scales = 1.0 / jnp.sqrt(jnp.where(means > 0, means, 1.0))
        promised = np.insert(np.broadcast_to(fractions, num_tasks - 1), place, 0.0)
        is_primary = np.arange(num_tasks) == place
        weights, _ = prioritised_weights(gramian, scales, promised, is_primary)
        return grads.combine(weights), state

    return balancer("pcd", init, update, num_tasks=num_tasks)


@full_precision
def prioritised_weights(
    gramian: Float[Array, "tasks tasks"],
    scales: Float[Array, " tasks"],
    promised: Float[Array | np.ndarray, " tasks"],
    is_primary: Bool[Array | np.ndarray, " tasks"],
) -> tuple[Float[Array, " tasks"], Info]:
    """Weights of the direction, which is as long as the primary gradient.

    Args:
      gramian: inner products of the tasks' gradients.
      scales: what normalises the gradients, positive.
      promised: the fraction for each task, zero for the primary one.
      is_primary: True for the primary task alone.

    Returns:
      The weights, none negative, and how well the constrained problem is solved.
    """
    matrix, units, active = in_units(gramian)
    squares = jnp.diagonal(matrix)
    # Relative to the primary gradient, normalised and in units.
    ratios = scales * units
    ratios = ratios / jnp.sum(jnp.where(is_primary, ratios, 0.0))
    margins = jnp.where(active, promised * ratios * squares, 0.0)
    first = jnp.where(is_primary & active, 1.0, 0.0)
    x, info = bounded_qp(matrix, -margins, first, active & ~is_primary)
    # Whatever the direction, one of several promises that contradict each other is
    # broken altogether: half of each tells them from those that are kept.
    broken = (margins > 0) & (product(matrix, x)[0] < 0.5 * margins)
    limit = _LARGEST_MULTIPLIER * jnp.maximum(1.0, jnp.max(margins))
    contradict = jnp.any(broken | (x > limit))
    x = jnp.where(contradict, first, x)
    square, most = x @ product(matrix, x)[0], x @ jnp.sqrt(squares)
    # Not `>`, so that NaN shows.
    vanishes = square <= _ROUNDING * most**2
    primary = jnp.sum(jnp.where(is_primary, jnp.diagonal(gramian), 0.0))
    length = jnp.sqrt(primary / jnp.where(vanishes, 1.0, square))
    return jnp.where(vanishes, 0.0, x * length / units), info
