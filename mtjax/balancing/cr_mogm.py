"""CR-MOGM: correlation-reduced multi-objective gradient manipulation."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, keep_absent
from mtjax.balancing.weights_of import weights_of


class CRMOGMState(NamedTuple):
    """State of `cr_mogm`.

    Attributes:
      weights: `(tasks,)` float32, moving averages of the inner balancer's weights.
      seen: `(tasks,)` bool, which tasks have an average.
      inner: state of the inner balancer.
    """

    weights: Array
    seen: Array
    inner: Any


def cr_mogm(
    inner: optax.GradientTransformationExtraArgs,
    num_tasks: int,
    *,
    momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages another balancer's weights over steps, against the noise of batches.

    :math:`\lambda_k = \alpha \lambda_{k-1} + (1 - \alpha) \hat\lambda_k`, where
    :math:`\hat\lambda_k` are the weights that the inner balancer finds in step
    :math:`k`; the direction is :math:`\sum_t \lambda_{k,t} g_t`. Weights found on a
    batch correlate with its gradients, which biases the direction; averages do less.

    Args:
      inner: a balancer whose weights depend on the Gramian and the losses, such as
        `mtjax.mgda`, `mtjax.cagrad`, `mtjax.pcgrad`.
      num_tasks: number of tasks.
      momentum: :math:`\alpha` in [0, 1); 0 gives `inner`.

    Returns:
      A balancer with state, which needs what `inner` needs. The average of a task that
      is absent stays.

    Raises:
      ValueError: if `momentum` is out of its range.
      TypeError: at update time, if `inner` works on the elements of the gradients.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> tx = cr_mogm(mtjax.mgda(), 2, momentum=0.5)
      >>> grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> updates, state = tx.update(grads, tx.init(None))
      >>> print(updates)
      [0.4 0.8]
      >>> print(tx.update(grads[::-1], state)[0])
      [1. 0.5]

    References:
      On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond,
      2022, algorithm 1, with a constant momentum. The averages start at the first
      weights that are found, where the paper leaves the start open.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")

    def init(params):
        return CRMOGMState(
            jnp.zeros(num_tasks, jnp.float32),
            jnp.zeros(num_tasks, bool),
            inner.init(params),
        )

    def update(grads, state, step):
        found, inner_state = weights_of(inner, grads, state.inner, step)
        mixed = momentum * state.weights + (1.0 - momentum) * found
        weights = jnp.where(step.present, jnp.where(state.seen, mixed, found), 0.0)
        moves = step.present & jnp.isfinite(weights)
        state = CRMOGMState(
            keep_absent(weights, state.weights, moves), state.seen | moves, inner_state
        )
        return grads.combine(weights), state

    return balancer("cr_mogm", init, update, num_tasks=num_tasks)
