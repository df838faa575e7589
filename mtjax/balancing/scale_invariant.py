"""Scale-invariant loss: the sum of the log-losses."""

import jax.numpy as jnp
import optax

from mtjax.balancing.scalarisation import scalarisation


def scale_invariant(*, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    r"""Minimises the sum of the logarithms of the losses, which knows no units.

    :math:`d = \nabla \sum_t \log L_t = \sum_t g_t / L_t`, on shared and on
    task-specific parameters alike. Multiplying a loss by a positive number does not
    change it.

    Args:
      eps: smallest loss that is told apart, positive. A loss at or below it, negative
        ones included, has the weight :math:`1 / \epsilon`.

    Returns:
      A balancer without state, of the cost of one backward pass. Needs `losses`.

    Raises:
      ValueError: if `eps` is not positive, or `losses` are not passed to the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_invariant()
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> print(tx.update(grads, tx.init(None), losses=jnp.array([2.0, 6.0]))[0])
      [0.5 0.5]

    References:
      Multi-Task Learning as a Bargaining Game, 2022, the baseline SI. The bound `eps`
      is ours.
    """

    def log_product(losses, present):
        return jnp.sum(jnp.log(losses), where=present)

    return scalarisation("scale_invariant", log_product, eps=eps)
