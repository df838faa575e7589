"""MetaBalance: auxiliary gradients as large as the target task's."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, check_choice, check_task, place_of
from mtjax.balancing.task_rows import per_row, present_rows, row_sums
from mtjax.gradients import TaskGradients


class MetaBalanceState(NamedTuple):
    """State of `metabalance`.

    Attributes:
      norms: params-shaped, `(tasks,)` float32 for every leaf: moving averages of the
        norms of its gradients, biased towards zero.
      counts: `(tasks,)` float32, steps that are averaged.
    """

    norms: Any
    counts: Array


def metabalance(
    num_tasks: int,
    target: str | int,
    *,
    relax: float = 0.7,
    beta: float = 0.9,
    strategy: Literal["both", "reduce", "enlarge"] = "both",
) -> optax.GradientTransformationExtraArgs:
    r"""Brings the auxiliary gradients close to the size of the target task's.

    On each shared parameter array, an auxiliary gradient :math:`g_t` becomes
    :math:`(r\, m_{\text{target}} / m_t + 1 - r)\, g_t`, where :math:`m` are moving
    averages of the norms on that array; then all are added up. Each task's own
    parameters get its own gradient.

    Args:
      num_tasks: number of tasks.
      target: the task that the others help, by name or by its place among the sorted
        names.
      relax: :math:`r \in [0, 1]`; 0 is the sum of the gradients, with 1 all have the
        target's norm.
      beta: factor of the moving averages, in [0, 1).
      strategy: "reduce" leaves gradients that are smaller than the target's as they
        are, "enlarge" those that are larger; "both" leaves none.

    Returns:
      A balancer with state. It works array by array, so it needs all tasks' gradients
      in memory (K backward passes).

    Raises:
      ValueError: if an argument is out of its range, or `target` not one of the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = metabalance(2, target=0, relax=0.5)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> print(tx.update(grads, tx.init(grads[0]))[0])
      [1.  2.5]

    References:
      MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes
      of Auxiliary Tasks, 2022, algorithm 1 and its strategies A, B and C. The averages
      are corrected for their start at zero, which only matters once tasks have been
      absent; until the target has been seen, nothing is scaled.
    """
    if not 0.0 <= relax <= 1.0:
        raise ValueError(f"`relax` must be in [0, 1], got {relax}.")
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"`beta` must be in [0, 1), got {beta}.")
    check_choice("strategy", strategy, ("both", "reduce", "enlarge"))
    check_task("target", target, num_tasks)

    def init(params):
        zeros = lambda: jnp.zeros(num_tasks, jnp.float32)
        return MetaBalanceState(jax.tree.map(lambda _: zeros(), params), zeros())

    def update(grads, state, step):
        place = place_of("target", target, grads.tasks)
        rows = present_rows(grads, step.present)
        # In units of the largest entry, so that no square overflows.
        norms = jax.tree.map(_norms, rows)
        finite = [jnp.isfinite(n) for n in jax.tree.leaves(norms)]
        known = step.present & jnp.all(jnp.stack(finite), axis=0)
        counts = state.counts + known
        unbiased = jnp.maximum(1.0 - beta**counts, 1.0 - beta)

        def average(old, new):
            return jnp.where(known, beta * old + (1.0 - beta) * new, old)

        def factors(average):
            means = average / unbiased
            ratios = means[place] / jnp.where(means > 0, means, 1.0)
            if strategy == "reduce":
                ratios = jnp.minimum(ratios, 1.0)
            if strategy == "enlarge":
                ratios = jnp.maximum(ratios, 1.0)
            scaled = (
                (means > 0) & (jnp.arange(num_tasks) != place) & (counts[place] > 0)
            )
            return jnp.where(scaled, relax * ratios + 1.0 - relax, 1.0)

        averages = jax.tree.map(average, state.norms, norms)
        scaled = jax.tree.map(
            lambda g, shared, m: (
                (per_row(factors(m), g) * g).astype(g.dtype) if shared else g
            ),
            rows,
            grads.shared,
            averages,
        )
        updates = TaskGradients.from_stacked(scaled, split=grads.split).combine()
        return updates, MetaBalanceState(averages, counts)

    return balancer("metabalance", init, update, num_tasks=num_tasks)


def _norms(rows: Array) -> Array:
    """The norm of each row, with squares in units of the largest entry."""
    axes = tuple(range(1, rows.ndim))
    unit = jnp.max(jnp.abs(rows), axis=axes, initial=0.0).astype(jnp.float32)
    unit = jnp.where(unit > 0, unit, 1.0)
    return unit * jnp.sqrt(row_sums((rows / per_row(unit, rows)) ** 2))
