"""Uncertainty weighting."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, check_choice
from mtjax.balancing.learnt import train_per_task


class UWState(NamedTuple):
    """State of `uw`.

    Attributes:
      log_variances: `(tasks,)` float32.
      opt_state: state of the optimizer of the log-variances.
    """

    log_variances: Array
    opt_state: Any


def uw(
    num_tasks: int,
    *,
    form: Literal["regression", "classification"] = "regression",
    optimizer: optax.GradientTransformation | None = None,
    start: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs each loss by a learnt homoscedastic uncertainty.

    Minimises :math:`\sum_t \tfrac12 e^{-s_t} L_t + \tfrac12 s_t` over the parameters
    and over the log-variances :math:`s_t`; the "classification" form leaves the first
    half out. The weights apply to shared and task-specific parameters alike. At fixed
    losses the log-variances settle at :math:`s_t = \log L_t` ("classification":
    :math:`\log 2 L_t`), where the weight is :math:`1 / (2 L_t)`.

    Args:
      num_tasks: number of tasks.
      form: likelihood that the losses come from.
      optimizer: trains the log-variances; `optax.adam(1e-3)` if not given.
      start: initial log-variance.

    Returns:
      A balancer with state, of the cost of one backward pass. Needs `losses`.

    Raises:
      ValueError: if `form` is unknown, or `losses` are not passed to the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = uw(2)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> print(tx.update(grads, tx.init(None), losses=jnp.array([1.0, 2.0]))[0])
      [0.5 1.5]

    References:
      Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
      Semantics, 2018, equations 7 and 10. There the log-variances are trained together
      with the model; here by an optimizer of their own, which keeps the balancer a
      transform on gradients and spares them the model's weight decay.
    """
    check_choice("form", form, ("regression", "classification"))
    half = 0.5 if form == "regression" else 1.0
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer

    def init(params):
        del params
        log_variances = jnp.full(num_tasks, start, jnp.float32)
        return UWState(log_variances, optimizer.init(log_variances))

    def update(grads, state, step):
        s = state.log_variances
        weights = half * jnp.exp(-s)
        moves = step.present & jnp.isfinite(step.losses)
        slopes = 0.5 - weights * step.losses
        trained = train_per_task(optimizer, slopes, s, state.opt_state, moves)
        return grads.scale(weights).combine(), UWState(*trained)

    return balancer("uw", init, update, num_tasks=num_tasks, needs=("losses",))
