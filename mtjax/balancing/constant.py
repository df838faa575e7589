"""Constant task weights, or weights that follow schedules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from mtjax.balancing.balancer import balancer

Weight = float | Callable[..., Any]


class ConstantState(NamedTuple):
    """Of `constant` with schedules.

    Attributes:
      count: number of updates so far.
    """

    count: Int[Array, ""]


def constant(
    weights: Mapping[str, Weight] | Sequence[Weight],
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs the tasks' losses with weights that are given.

    :math:`d = \sum_t w_t g_t`, on shared and on task-specific parameters alike.

    Args:
      weights: :math:`w_t \ge 0`, by task name or in the order of the sorted names; each
        a number, or an optax schedule of the number of updates so far, such as PLE's
        :math:`w_t \gamma_t^e`, `optax.exponential_decay(w, steps_per_epoch, gamma)`.

    Returns:
      A balancer of the cost of one backward pass; its state is a counter if a weight is
      a schedule, else empty.

    Raises:
      ValueError: if a weight is negative or not finite; at update time, if the tasks
        are not those of the gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = constant([2.0, 1.0])
      >>> print(tx.update(jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(None))[0])
      [2. 3.]
      >>> tx = constant([1.0, optax.exponential_decay(1.0, 1, 0.5)])
      >>> state = tx.init(None)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.eye(2), state)
      >>> print(updates)
      [1.   0.25]
    """
    if isinstance(weights, Mapping):
        order = tuple(sorted(weights))
        values = [weights[task] for task in order]
    else:
        order, values = None, list(weights)
    numbers = [w for w in values if not callable(w)]
    if not values or not all(np.isfinite(w) and w >= 0 for w in numbers):
        raise ValueError(
            f"`weights` must be finite and not negative, one per task, got {weights}."
        )

    def init(params):
        del params
        fixed = len(numbers) == len(values)
        return optax.EmptyState() if fixed else ConstantState(jnp.zeros((), jnp.int32))

    def update(grads, state, step):
        del step
        if order is not None and order != grads.tasks:
            raise ValueError(
                f"`weights` must name exactly the tasks {grads.tasks}, got {order}."
            )
        now = [w(state.count) if callable(w) else w for w in values]
        found = grads.scale(jnp.asarray(now, jnp.float32)).combine()
        if isinstance(state, ConstantState):
            state = ConstantState(state.count + 1)
        return found, state

    return balancer("constant", init, update, num_tasks=len(values))
