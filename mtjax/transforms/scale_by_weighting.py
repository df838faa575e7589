"""A weighting in front of any other balancer."""

import optax

from mtjax.balancing.balancer import balancer
from mtjax.balancing.weights_of import weights_of


def scale_by_weighting(
    weighting: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Scales the tasks' gradients by the weights of a loss weighting.

    `optax.chain(scale_by_weighting(uw(2)), pcgrad(), adam(1e-3))` weighs the losses by
    their uncertainty and then resolves the conflicts of the weighted losses.

    Args:
      weighting: a balancer whose weights depend on the losses alone, such as
        `mtjax.uw`, `mtjax.dwa`, `mtjax.famo` (without `optimizer`), `mtjax.constant`,
        or on the Gramian, such as `mtjax.nash_mtl`: its weights then apply to
        task-specific parameters too.

    Returns:
      A transform from task gradients to task gradients.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> weigh = scale_by_weighting(mtjax.constant([1.0, 2.0]))
      >>> tx = optax.chain(weigh, mtjax.mgda(), optax.sgd(1.0))
      >>> updates, _ = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [-0.8 -0.4]
    """

    def update(grads, state, step):
        weights, state = weights_of(weighting, grads, state, step)
        return grads.scale(weights), state

    return balancer("scale_by_weighting", weighting.init, update)
