"""Soft optimal uncertainty weighting."""

import jax
import optax

from mtjax.balancing.scalarisation import loss_weighting


def uw_so(
    *, temperature: float = 1.0, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs tasks by the softmax of their inverse losses, the optimum of `uw`.

    :math:`w = \mathrm{softmax}(1 / (\tau L))`, on shared and on task-specific
    parameters alike. The inverse losses are where uncertainty weighting would settle;
    the softmax gives them a temperature and a sum of one.

    Args:
      temperature: :math:`\tau > 0`; large values make the weights equal. The paper
        tunes it for every data set and model: its unit is that of an inverse loss.
      eps: smallest loss that is told apart, positive. A loss at or below it, negative
        ones included, counts as `eps`.

    Returns:
      A balancer without state, of the cost of one backward pass. Needs `losses`.

    Raises:
      ValueError: if an argument is not positive, or `losses` are not passed to the
        update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = uw_so()
      >>> print(tx.update(jnp.eye(2), tx.init(None), losses=jnp.array([0.5, 0.5]))[0])
      [0.5 0.5]

    References:
      Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning, 2024, the
      method UW-SO. The bound `eps` is ours.
    """
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")

    def weigh(losses, present):
        return jax.nn.softmax(1.0 / (temperature * losses), where=present)

    return loss_weighting("uw_so", weigh, eps=eps)
