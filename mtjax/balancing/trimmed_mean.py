"""Trimmed mean: the mean without the extremes, coordinate by coordinate."""

import jax
import jax.numpy as jnp
import optax

from mtjax.balancing.balancer import balancer


def trimmed_mean(*, trim: int = 1) -> optax.GradientTransformationExtraArgs:
    r"""Leaves out the largest and the smallest entries in every coordinate.

    The direction is, coordinate by coordinate, the mean over the tasks that are left
    when the :math:`b` smallest and the :math:`b` largest entries are dropped.

    Args:
      trim: :math:`b`, not negative. With :math:`2 b` tasks or fewer, as many are
        dropped as leave one or two: the median.

    Returns:
      A balancer without state. It works element by element, so it needs all tasks'
      gradients in memory (K backward passes).

    Raises:
      ValueError: if `trim` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = trimmed_mean(trim=1)
      >>> grads = jnp.array([[1.0, 9.0], [2.0, -2.0], [4.0, 3.0], [90.0, 1.0]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [3. 2.]

    References:
      Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, 2018,
      definition 2, with a number in place of a fraction of entries.
    """
    if trim < 0:
        raise ValueError(f"`trim` must not be negative, got {trim}.")

    def update(grads, state, step):
        total = jnp.sum(step.present)
        dropped = jnp.minimum(trim, jnp.maximum(total - 1, 0) // 2)
        ranks = jnp.arange(len(grads.tasks))
        kept = (ranks >= dropped) & (ranks < total - dropped)
        count = jnp.maximum(total - 2 * dropped, 1)

        def reduce(rows, is_shared):
            over = lambda mask: mask.reshape(-1, *[1] * (rows.ndim - 1))
            present = over(step.present)
            if not is_shared:
                return jnp.sum(jnp.where(present, rows, 0), axis=0)
            # Absent tasks go behind the largest entry.
            ordered = jnp.sort(jnp.where(present, rows, jnp.inf), axis=0)
            ordered = jnp.where(over(kept), ordered, 0).astype(jnp.float32)
            return (jnp.sum(ordered, axis=0) / count).astype(rows.dtype)

        return jax.tree.map(reduce, grads.stack(), grads.shared), state

    return balancer("trimmed_mean", lambda params: optax.EmptyState(), update)
