"""IMTL: impartial multi-task learning of losses and gradients."""

import optax

from mtjax.balancing.balancer import balancer, masked_gramian
from mtjax.balancing.imtl_g import equal_projection_weights
from mtjax.balancing.imtl_l import imtl_l
from mtjax.balancing.weights_of import weights_of


def imtl(
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns scales of the losses, and goes the same way along their gradients.

    The losses :math:`e^{s_t} L_t` with the scales of `imtl_l`, and `imtl_g` on their
    gradients: the projections of the direction on all gradients are equal, and so
    become the scaled losses. Task-specific parameters, which have no other gradient to
    be balanced with, get that of their scaled loss.

    Args:
      num_tasks: number of tasks.
      optimizer: trains the :math:`s_t`, see `imtl_l`.
      eps: smallest loss that is told apart, see `imtl_l`.

    Returns:
      A balancer whose state is an `IMTLLState`. Needs `losses`.

    Raises:
      ValueError: if `eps` is not positive, or `losses` are not passed to the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = imtl(2)
      >>> grads, losses = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 2.0])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None), losses=losses)[0])
      [0.75 0.75]

    References:
      Towards Impartial Multi-task Learning, 2021, algorithm 1. The same as `imtl_l`
      inside `mtjax.scale_by_weighting`, followed by `imtl_g`.
    """
    scales = imtl_l(num_tasks, optimizer=optimizer, eps=eps)

    def update(grads, state, step):
        weights, state = weights_of(scales, grads, state, step)
        scaled = grads.scale(weights)
        shares = equal_projection_weights(masked_gramian(scaled, step))
        return scaled.combine(shares), state

    return balancer("imtl", scales.init, update, num_tasks=num_tasks, needs=("losses",))
