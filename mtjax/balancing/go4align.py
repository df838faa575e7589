"""GO4Align: group optimisation for the alignment of tasks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import balancer, keep_absent
from mtjax.balancing.scalarisation import check_eps, usable_losses


class GO4AlignState(NamedTuple):
    """State of `go4align`.

    Attributes:
      logits: `(tasks,)` float32, minus the step size times the sum of the losses.
    """

    logits: Array


def go4align(
    num_tasks: int, num_groups: int, *, step_size: float = 1e-4, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs tasks by the inverse of their losses, the same within a group.

    With the scales :math:`S_t = \sum_s L_s / L_t` and the shares :math:`p`, which are
    multiplied by :math:`\exp(-\eta L_t)` in every step and sum to one, the
    risk-guided indicators :math:`p_t S_t` are split into groups by k-means; the weight
    of a task is the mean of its group. The weights apply to shared and to task-specific
    parameters alike.

    Args:
      num_tasks: number of tasks.
      num_groups: number of groups, from 1, where all tasks have the same weight, to
        `num_tasks`, where each has its own.
      step_size: :math:`\eta > 0`, per unit of a loss.
      eps: smallest loss that is told apart, positive. A loss at or below it, negative
        ones included, counts as `eps`.

    Returns:
      A balancer with state, of the cost of one backward pass. Needs `losses`.

    Raises:
      ValueError: if an argument is out of its range, or `losses` are not passed to the
        update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = go4align(3, 2)
      >>> losses = jnp.array([1.0, 1.0, 4.0])
      >>> with jnp.printoptions(precision=2):
      ...     print(tx.update(jnp.eye(3), tx.init(None), losses=losses)[0])
      [2.  2.  0.5]

    References:
      GO4Align: Group Optimization for Multi-Task Alignment, 2024, equations 3 to 6 as
      in its public code. There k-means starts at random and may end in a local
      optimum; on numbers the best groups are found exactly.
    """
    if not 1 <= num_groups <= max(num_tasks, 1):
        raise ValueError(
            f"`num_groups` must be from 1 to the {num_tasks} tasks, got {num_groups}."
        )
    if step_size <= 0:
        raise ValueError(f"`step_size` must be positive, got {step_size}.")
    check_eps(eps)

    def init(params):
        del params
        return GO4AlignState(jnp.zeros(num_tasks, jnp.float32))

    def update(grads, state, step):
        losses = usable_losses(step.losses, step.present, eps)
        logits = state.logits - step_size * losses
        scales = jnp.sum(losses, where=step.present) / losses
        indicators = jax.nn.softmax(logits, where=step.present) * scales
        weights = group_means(indicators, step.present, num_groups)
        known = step.present & jnp.isfinite(step.losses)
        logits = keep_absent(logits, state.logits, known)
        return grads.scale(weights).combine(), GO4AlignState(logits)

    return balancer("go4align", init, update, num_tasks=num_tasks, needs=("losses",))


def group_means(
    values: Float[Array, " tasks"], present: Bool[Array, " tasks"], num_groups: int
) -> Float[Array, " tasks"]:
    """The mean of each value's group, for the best split into at most so many groups.

    Groups of numbers are intervals, so the split of least squared deviation is found
    exactly by dynamic programming over the sorted numbers.

    Args:
      values: finite numbers.
      present: which of them count.
      num_groups: number of groups, at least 1.

    Returns:
      The means; zero for values that do not count.
    """
    size = len(values)
    order = jnp.argsort(jnp.where(present, values, jnp.inf))
    # In units of the largest value, so that no square overflows.
    largest = jnp.max(jnp.abs(values), where=present, initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    x, counted = (values / unit)[order], present[order]
    place = jnp.arange(size)

    def interval(first, last):
        """Squared deviation and mean of the numbers from one place to another."""
        members = counted & (place >= first) & (place <= last)
        mean = jnp.sum(x, where=members) / jnp.maximum(jnp.sum(members), 1)
        cost = jnp.sum((x - mean) ** 2, where=members)
        return jnp.where(first <= last, cost, jnp.inf), mean

    to_every_last = jax.vmap(interval, (None, 0))
    costs, means = jax.vmap(to_every_last, (0, None))(place, place)

    # best[j]: least cost of the first j numbers; starts[k][j]: where their last group,
    # one of at most k + 1, begins.
    best = jnp.concatenate([jnp.zeros(1), costs[0]])
    starts = [jnp.zeros(size, int)]
    for _ in range(num_groups - 1):
        total = best[:size, None] + costs
        starts.append(jnp.argmin(total, axis=0))
        best = jnp.concatenate([jnp.zeros(1), jnp.min(total, axis=0)])

    result, end = jnp.zeros(size), jnp.asarray(size - 1)
    for first in reversed(starts):
        start = first[jnp.maximum(end, 0)]
        inside = (place >= start) & (place <= end)
        result = jnp.where(inside, means[start, jnp.maximum(end, 0)], result)
        end = jnp.where(end >= 0, start - 1, end)
    result = jnp.zeros(size).at[order].set(jnp.where(counted, result, 0.0))
    return unit * result
