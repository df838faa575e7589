"""COSMOS: a weighted sum with a penalty on the angle to the preference."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from mtjax.balancing.balancer import check_preference
from mtjax.balancing.scalarisation import preferred, safe_norm, scalarisation


def cosmos(
    preference: ArrayLike | Sequence[float | int] | None = None, *, penalty: float = 2.0
) -> optax.GradientTransformationExtraArgs:
    r"""Minimises a weighted sum and the angle between the losses and the weights.

    :math:`d = \nabla (\sum_t r_t L_t - \lambda \cos(r, L))`, on shared and on
    task-specific parameters alike. The second term pulls the losses towards the ray
    along :math:`r`, so different preferences reach different points of the Pareto
    front, also where it is not convex. It may weigh a loss that is small for its
    preference negatively, which makes that loss grow.

    Args:
      preference: :math:`r`, not negative, one per task in the order of the sorted
        names; equal if not given. Divided by its sum over the present tasks.
      penalty: :math:`\lambda`, not negative, in units of a loss; 0 gives the weighted
        sum. The paper takes values from 0.01 to 8, and 2 on multi-MNIST.

    Returns:
      A balancer without state, of the cost of one backward pass. Needs `losses`. The
      angle of losses that are all zero counts as zero.

    Raises:
      ValueError: if `penalty` is negative, `preference` is not one finite entry per
        task, none negative and not all zero, or `losses` are not passed to the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = cosmos([3.0, 1.0], penalty=0.0)
      >>> print(tx.update(jnp.eye(2), tx.init(None), losses=jnp.array([1.0, 2.0]))[0])
      [0.75 0.25]

    References:
      Scalable Pareto Front Approximation for Deep Multi-Objective Learning, 2021,
      section 3. There the model also gets the preference as an input, drawn anew for
      every batch; here it is fixed.
    """
    if penalty < 0:
        raise ValueError(f"`penalty` must not be negative, got {penalty}.")
    if preference is not None:
        check_preference(preference)

    def penalised_sum(losses, present):
        r = preferred(preference, present)
        r = r / jnp.maximum(jnp.sum(r), 1e-30)
        losses = jnp.where(present, losses, 0.0)
        # The angle knows no units: in those of the largest loss no square overflows.
        unit = jax.lax.stop_gradient(jnp.max(jnp.abs(losses)))
        scaled = losses / jnp.where(unit > 0, unit, 1.0)
        lengths = safe_norm(r) * safe_norm(scaled)
        weighted = jnp.sum(r * losses)
        aligned = jnp.sum(r * scaled) / jnp.where(lengths > 0, lengths, 1.0)
        return weighted - penalty * aligned

    return scalarisation("cosmos", penalised_sum)
