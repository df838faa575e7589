"""Geometric loss strategy: the geometric mean of the losses."""

import jax.numpy as jnp
import optax

from mtjax.balancing.balancer import mean_over_present
from mtjax.balancing.scalarisation import scalarisation


def gls(*, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    r"""Minimises the geometric mean of the losses.

    :math:`d = \nabla \bar L` with :math:`\bar L = (\prod_t L_t)^{1/T}`, which weighs
    each loss by :math:`\bar L / (T L_t)`, on shared and on task-specific parameters
    alike. Multiplying a loss by a positive number does not change the direction.

    Args:
      eps: smallest loss that is told apart, positive. A loss at or below it, negative
        ones included, counts as `eps`.

    Returns:
      A balancer without state, of the cost of one backward pass. Needs `losses`.

    Raises:
      ValueError: if `eps` is not positive, or `losses` are not passed to the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = gls()
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> print(tx.update(grads, tx.init(None), losses=jnp.array([1.0, 4.0]))[0])
      [1.  0.5]

    References:
      MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for
      Multi-Task Learning, 2019. The mean is over the tasks that are
      present; the bound `eps` is ours.
    """

    def geometric_mean(losses, present):
        return jnp.exp(mean_over_present(jnp.log(losses), present))

    return scalarisation("gls", geometric_mean, eps=eps)
