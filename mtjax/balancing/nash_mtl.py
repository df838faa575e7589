"""Nash-MTL: the direction on which bargaining tasks agree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, keep_absent, masked_gramian
from mtjax.balancing.solvers import fair_equilibrium, full_precision, in_units


class NashMTLState(NamedTuple):
    """State of `nash_mtl`.

    Attributes:
      step: `()` int32, steps taken.
      shares: `(tasks,)` float32, latest weights of the unit gradients.
    """

    step: Array
    shares: Array


def nash_mtl(
    num_tasks: int, *, max_norm: float | None = 1.0, update_every: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Steps along the Nash bargaining solution of the tasks.

    :math:`d = \sum_t \alpha_t g_t` with :math:`\alpha > 0` such that
    :math:`G G^\top \alpha = 1 / \alpha`. The direction does not change if a loss is
    multiplied by a positive number. Before clipping its norm is the square root of the
    number of tasks, whatever the gradients; where no direction improves all tasks it
    has no solution, and ours shrinks to almost nothing.

    Args:
      num_tasks: number of tasks.
      max_norm: longest direction; None leaves it as it is. The public default of 1
        always applies from two tasks on, so the direction has unit norm and the
        learning rate alone sets the step.
      update_every: solve for new weights every so many steps, with the latest weights
        of unit gradients in between.

    Returns:
      A balancer whose state starts the next solve. Zero gradients count as absent.

    Raises:
      ValueError: if `max_norm` is not positive or `update_every` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = nash_mtl(2, max_norm=None)
      >>> grads = jnp.array([[4.0, 0.0], [0.0, 0.5]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [1. 1.]

    References:
      Multi-Task Learning as a Bargaining Game, 2022, claim 3.1. Solved by Newton's
      method on the convex function whose stationary point it is. Between updates the
      paper keeps the weights of the gradients, we those of the unit gradients; with one
      task the direction is the unit gradient.
    """
    if max_norm is not None and max_norm <= 0:
        raise ValueError(f"`max_norm` must be positive or None, got {max_norm}.")
    if update_every < 1:
        raise ValueError(f"`update_every` must be at least 1, got {update_every}.")

    def init(params):
        del params
        return NashMTLState(jnp.zeros((), jnp.int32), jnp.ones(num_tasks, jnp.float32))

    def update(grads, state, step):
        matrix, units, active = in_units(masked_gramian(grads, step))
        lengths = jnp.sqrt(jnp.diagonal(matrix))
        start = jnp.where(active, state.shares, 1.0) / lengths
        solve = lambda: fair_equilibrium(matrix, start)[0] * lengths
        if update_every == 1:
            shares = solve()
        else:
            shares = jax.lax.cond(
                state.step % update_every == 0, solve, lambda: state.shares
            )
        used = jnp.where(active, shares, 0.0)
        # A Gramian that overflowed must show in the update, not stay in the state.
        kept = active & jnp.isfinite(shares)
        if max_norm is not None:
            used = used * jnp.minimum(1.0, max_norm / _length(used / lengths, matrix))
        state = NashMTLState(
            step=state.step + 1,
            shares=keep_absent(shares, state.shares, kept),
        )
        return grads.combine(used / lengths / units), state

    return balancer("nash_mtl", init, update, num_tasks=num_tasks)


@full_precision
def _length(weights, matrix):
    """Length of a weighted sum of gradients, 1 where it is zero."""
    square = weights @ matrix @ weights
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))
