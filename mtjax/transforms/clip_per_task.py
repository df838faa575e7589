"""Clipping each task's gradient by itself."""

import jax.numpy as jnp
import optax

from mtjax.balancing.balancer import balancer, masked_gramian


def clip_per_task(max_norm: float) -> optax.GradientTransformationExtraArgs:
    r"""Shortens each task's gradient to a norm: :math:`g_t \min(1, c / \|g_t\|)`.

    The norm is that on the shared parameters; the task's own parameters are scaled by
    the same factor.

    Args:
      max_norm: :math:`c > 0`.

    Returns:
      A transform from task gradients to task gradients, to stand before a balancer. It
      costs a Gramian, which a balancer on the Gramian behind it does not pay again.

    Raises:
      ValueError: if `max_norm` is not positive.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> tx = optax.chain(clip_per_task(1.0), mtjax.equal())
      >>> grads = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [0.6 1.3]
    """
    if max_norm <= 0:
        raise ValueError(f"`max_norm` must be positive, got {max_norm}.")

    def update(grads, state, step):
        norms = jnp.sqrt(jnp.diagonal(masked_gramian(grads, step)))
        return grads.scale(max_norm / jnp.maximum(norms, max_norm)), state

    return balancer("clip_per_task", lambda params: optax.EmptyState(), update)
