"""How much the tasks' gradients are in each other's way."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.gradients import TaskGradients


class ConflictStatistics(NamedTuple):
    """Statistics of the tasks' gradients on the shared parameters; a pytree to log.

    Attributes:
      cosines: `(tasks, tasks)` float32, one on the diagonal, zero for absent tasks and
        zero gradients.
      conflict_rate: `()` share of the pairs of present tasks whose cosine is negative.
      mean_cosine: `()` mean cosine of the pairs of present tasks.
      norms: `(tasks,)` gradient norms, in units of loss per unit of parameter.
      condition_number: `()` ratio of the largest to the smallest singular value of the
        gradients of present tasks; infinite if they are linearly dependent.
    """

    cosines: Array
    conflict_rate: Array
    mean_cosine: Array
    norms: Array
    condition_number: Array


def conflict_statistics(
    grads: TaskGradients | Float[Array, "tasks tasks"],
    *,
    present: Bool[Array, " tasks"] | None = None,
) -> ConflictStatistics:
    """Measures conflict between tasks, inside or outside `jit`.

    Args:
      grads: task gradients, or their Gramian if it is at hand already. The Gramian is
        what costs time: log at a period, under `jax.lax.cond` or every n-th call of a
        second jitted function.
      present: which tasks the batch has labels for; all if not given.

    Returns:
      The statistics. With fewer than two present tasks the rate and the mean cosine
      are zero.

    Example:
      >>> statistics = conflict_statistics(jnp.array([[4.0, -1.0], [-1.0, 1.0]]))
      >>> print(statistics.conflict_rate, statistics.cosines[0, 1], statistics.norms)
      1.0 -0.5 [2. 1.]
    """
    gramian = grads.gramian() if isinstance(grads, TaskGradients) else grads
    size = len(gramian)
    if present is None:
        present = jnp.ones(size, bool)
    both = present[:, None] & present[None, :]
    gramian = jnp.where(both, gramian, 0.0)
    squares = jnp.diagonal(gramian)
    norms = jnp.sqrt(squares)
    safe = jnp.where(squares > 0, norms, 1.0)
    eye = jnp.eye(size)
    matrix = jnp.clip(gramian / safe[:, None] / safe[None, :], -1.0, 1.0)
    matrix = jnp.where(eye > 0, (squares > 0).astype(jnp.float32), matrix)
    pairs = both & (eye == 0)
    count = jnp.maximum(jnp.sum(pairs), 1)
    # Absent tasks take the largest eigenvalue, so that they are never the smallest.
    scale = jnp.where(jnp.max(squares) > 0, jnp.max(squares), 1.0)
    eigenvalues = jnp.linalg.eigvalsh(gramian / scale)
    largest = eigenvalues[-1]
    filled = gramian / scale + jnp.diag(jnp.where(present, 0.0, largest))
    smallest = jnp.linalg.eigvalsh(filled)[0]
    dependent = smallest <= size * jnp.finfo(jnp.float32).eps * largest
    ratio = largest / jnp.where(dependent, 1.0, smallest)
    return ConflictStatistics(
        cosines=matrix,
        conflict_rate=jnp.sum(pairs & (matrix < 0)) / count,
        mean_cosine=jnp.sum(jnp.where(pairs, matrix, 0.0)) / count,
        norms=norms,
        condition_number=jnp.where(dependent, jnp.inf, jnp.sqrt(ratio)),
    )
