"""Krum and Multi-Krum: selection by distance."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import gramian_balancer


def krum(
    *, n_byzantine: int = 1, n_selected: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the gradients that lie nearest to their nearest neighbours.

    Of :math:`n` gradients of which :math:`f` may be arbitrary, each has the score
    :math:`s_t = \sum_{j \in N_t} \|g_t - g_j\|^2` over its :math:`n - f - 2` nearest
    neighbours :math:`N_t`; the direction is the mean of the :math:`m` gradients of
    least score. For tasks as for workers: gradients unlike the others are left out.

    Args:
      n_byzantine: :math:`f`, not negative. The guarantee of the paper needs
        :math:`n > 2 f + 2`; with fewer tasks there still is one neighbour.
      n_selected: :math:`m`, at least 1; all tasks if there are fewer.

    Returns:
      A balancer without state. Absent tasks are no neighbours.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = krum(n_byzantine=1, n_selected=2)
      >>> grads = jnp.array([[1.0, 0.0], [2.0, 0.0], [2.0, 2.0], [-90.0, 9.0]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [1.5 0. ]

    References:
      Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, 2017,
      sections 4 and 5 (Multi-Krum). Of equal scores the earlier task is selected.
      Distances come from the Gramian, so those below a thousandth of the longest
      gradient are rounded.
    """
    if n_byzantine < 0:
        raise ValueError(f"`n_byzantine` must not be negative, got {n_byzantine}.")
    if n_selected < 1:
        raise ValueError(f"`n_selected` must be at least 1, got {n_selected}.")

    def weigh(gramian, step):
        return selected_weights(gramian, step.present, n_byzantine, n_selected)

    return gramian_balancer("krum", weigh)


def selected_weights(
    gramian: Float[Array, "tasks tasks"],
    present: Bool[Array, " tasks"],
    n_byzantine: int,
    n_selected: int,
) -> Float[Array, " tasks"]:
    """Equal weights of the tasks of least score.

    Args:
      gramian: inner products of the tasks' gradients.
      present: which tasks take part.
      n_byzantine: how many may be arbitrary.
      n_selected: how many are selected.

    Returns:
      Weights that sum to one, to zero if no task is present.
    """
    size, squares = len(gramian), jnp.diagonal(gramian)
    largest = jnp.max(squares)
    matrix = gramian / jnp.where(largest > 0, largest, 1.0)
    squares = jnp.diagonal(matrix)
    distances = jnp.maximum(squares[:, None] + squares[None, :] - 2.0 * matrix, 0.0)
    pairs = present[:, None] & present[None, :] & ~jnp.eye(size, dtype=bool)
    nearest = jnp.sort(jnp.where(pairs, distances, jnp.inf), axis=1)
    total = jnp.sum(present)
    neighbours = jnp.clip(total - n_byzantine - 2, 1, jnp.maximum(total - 1, 0))
    counted = jnp.arange(size)[None, :] < neighbours
    scores = jnp.sum(jnp.where(counted, nearest, 0.0), axis=1)
    ranks = jnp.argsort(jnp.argsort(jnp.where(present, scores, jnp.inf)))
    selected = present & (ranks < n_selected)
    return selected / jnp.maximum(jnp.sum(selected), 1)
