"""Bringing the tasks' gradients to the same length."""

import jax.numpy as jnp
import optax

from mtjax.balancing.balancer import balancer, masked_gramian, mean_over_present


def normalize_per_task(
    *, keep_mean_norm: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each task's gradient by its norm: :math:`g_t / \|g_t\|`.

    The norm is that on the shared parameters; the task's own parameters are scaled by
    the same factor. Zero gradients stay zero.

    Args:
      keep_mean_norm: multiply all by the mean of the norms afterwards, so that learning
        rates keep their meaning.

    Returns:
      A transform from task gradients to task gradients, to stand before a balancer.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> tx = optax.chain(normalize_per_task(), mtjax.equal())
      >>> grads = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [0.6 1.8]
    """

    def update(grads, state, step):
        norms = jnp.sqrt(jnp.diagonal(masked_gramian(grads, step)))
        factors = jnp.where(norms > 0, 1.0 / jnp.where(norms > 0, norms, 1.0), 0.0)
        if keep_mean_norm:
            factors = factors * mean_over_present(norms, step.present)
        return grads.scale(factors), state

    return balancer("normalize_per_task", lambda params: optax.EmptyState(), update)
