"""IMTL-L: impartial multi-task learning, its balance of losses."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer
from mtjax.balancing.learnt import train_per_task
from mtjax.balancing.scalarisation import check_eps, usable_losses


class IMTLLState(NamedTuple):
    """State of `imtl_l`.

    Attributes:
      log_scales: `(tasks,)` float32.
      opt_state: state of the optimizer of the log-scales.
    """

    log_scales: Array
    opt_state: Any


def imtl_l(
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns a scale for each loss that makes all scaled losses the same.

    Minimises :math:`\sum_t e^{s_t} L_t - s_t` over the parameters and over the
    log-scales :math:`s_t`, which start at zero. The weights :math:`e^{s_t}` apply to
    shared and to task-specific parameters alike. At fixed losses they settle at
    :math:`1 / L_t`.

    Args:
      num_tasks: number of tasks.
      optimizer: trains the log-scales; `optax.adam(1e-3)` if not given.
      eps: smallest loss that is told apart, positive. A loss at or below it, negative
        ones included, counts as `eps` for its scale, which therefore stays bounded.

    Returns:
      A balancer with state, of the cost of one backward pass. Needs `losses`.

    Raises:
      ValueError: if `eps` is not positive, or `losses` are not passed to the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = imtl_l(2, optimizer=optax.sgd(1.0))
      >>> _, state = tx.update(jnp.eye(2), tx.init(None), losses=jnp.array([1.0, 3.0]))
      >>> print(state.log_scales)
      [ 0. -2.]

    References:
      Towards Impartial Multi-Task Learning, 2021, section 3.2. There the log-scales are
      trained together with the model; here by an optimizer of their own, which spares
      them the model's weight decay. The same as `uw` up to the factors of one half.
    """
    check_eps(eps)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer

    def init(params):
        del params
        log_scales = jnp.zeros(num_tasks, jnp.float32)
        return IMTLLState(log_scales, optimizer.init(log_scales))

    def update(grads, state, step):
        weights = jnp.exp(state.log_scales)
        slopes = weights * usable_losses(step.losses, step.present, eps) - 1.0
        moves = step.present & jnp.isfinite(step.losses)
        trained = train_per_task(
            optimizer, slopes, state.log_scales, state.opt_state, moves
        )
        return grads.scale(weights).combine(), IMTLLState(*trained)

    return balancer("imtl_l", init, update, num_tasks=num_tasks, needs=("losses",))
