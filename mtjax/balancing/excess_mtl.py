"""ExcessMTL: weights by excess risk."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, keep_absent
from mtjax.balancing.task_rows import per_row, present_rows, row_sums
from mtjax.gradients import TaskGradients

# Keeps a coordinate that has had no gradient from a division by zero.
_DAMPING = 1e-7


class ExcessMTLState(NamedTuple):
    """State of `excess_mtl`.

    Attributes:
      logits: `(tasks,)` float32, whose softmax are the weights' shares.
      first: `(tasks,)` float32, the first excess risk that is not zero.
      squares: params-shaped, `(tasks, *leaf.shape)` float32: sums of squared gradients;
        they stay zero on task-specific leaves.
    """

    logits: Array
    first: Array
    squares: Any


def excess_mtl(
    num_tasks: int, *, step_size: float = 0.01
) -> optax.GradientTransformationExtraArgs:
    r"""Gives weight to tasks that are far from their own optimum, not to noisy ones.

    The excess risk of a task, its loss minus the best it can reach, is estimated by
    :math:`E_t = g_t^\top \mathrm{diag}(s_t)^{-1/2} g_t`, where :math:`s_t` sums up its
    squared gradients as Adagrad does. In every step :math:`w_t` is multiplied by
    :math:`\exp(\eta E_t / E_t(0))` and all are divided so that they sum to the number
    of tasks. The weights apply to shared and to task-specific parameters alike.

    Args:
      num_tasks: number of tasks.
      step_size: :math:`\eta > 0`.

    Returns:
      A balancer with state. It needs all tasks' gradients in memory (K backward
      passes), and as much again for the sums of their squares.

    Raises:
      ValueError: if `step_size` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = excess_mtl(2)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> print(tx.update(grads, tx.init(grads[0]))[0])
      [1. 4.]

    References:
      Robust Multi-Task Learning with Excess Risks, 2024, equations 6, 7 and 9, with the
      step size, the normalisation and the sum of its public code. An excess risk of
      zero is no baseline: a task's first other one is.
    """
    if step_size <= 0:
        raise ValueError(f"`step_size` must be positive, got {step_size}.")

    def init(params):
        zeros = lambda p: jnp.zeros((num_tasks, *jnp.shape(p)), jnp.float32)
        return ExcessMTLState(
            logits=jnp.zeros(num_tasks, jnp.float32),
            first=jnp.zeros(num_tasks, jnp.float32),
            squares=jax.tree.map(zeros, params),
        )

    def update(grads, state, step):
        rows = present_rows(grads, step.present)
        square = lambda g: g.astype(jnp.float32) ** 2
        squares = jax.tree.map(
            lambda s, g, shared: s + square(g) if shared else s,
            state.squares,
            rows,
            grads.shared,
        )
        risks = jax.tree.map(
            lambda s, g, shared: (
                row_sums(square(g) / jnp.sqrt(s + _DAMPING))
                if shared
                else jnp.zeros(num_tasks)
            ),
            squares,
            rows,
            grads.shared,
        )
        excess = sum(jax.tree.leaves(risks), start=jnp.zeros(num_tasks))
        known = step.present & jnp.isfinite(excess)
        first = jnp.where(known & (state.first == 0), excess, state.first)
        seen = known & (first > 0)
        ratios = jnp.where(seen, excess / jnp.where(seen, first, 1.0), 0.0)
        logits = keep_absent(state.logits + step_size * ratios, state.logits, known)
        shares = jax.nn.softmax(logits, where=step.present)
        weighted = TaskGradients.from_stacked(rows, split=grads.split).scale(
            jnp.sum(step.present) * shares
        )
        squares = jax.tree.map(
            lambda new, old: jnp.where(per_row(known, new), new, old),
            squares,
            state.squares,
        )
        return weighted.combine(), ExcessMTLState(logits, first, squares)

    return balancer("excess_mtl", init, update, num_tasks=num_tasks)
