"""Penalty-based boundary intersection."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import ArrayLike

from mtjax.balancing.balancer import check_preference
from mtjax.balancing.scalarisation import preferred, safe_norm, scalarisation

# Losses so close to the ray, relative to their size, are on it up to rounding.
_ON_THE_RAY = 1e-5


def pbi(
    preference: ArrayLike | Sequence[float | int] | None = None,
    *,
    theta: float = 5.0,
    reference: ArrayLike | Sequence[float | int] = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Minimises the losses along a preferred ray and their distance from it.

    :math:`d = \nabla (d_1 + \theta d_2)`, where with the unit vector :math:`\hat w` of
    the preference :math:`d_1 = \langle L - z, \hat w \rangle` and
    :math:`d_2 = \|L - z - d_1 \hat w\|`, on shared and on task-specific parameters
    alike. Different preferences reach different points of the Pareto front, also where
    it is not convex. It may weigh a loss that is small for its preference negatively,
    which makes that loss grow.

    Args:
      preference: :math:`w`, not negative, one per task in the order of the sorted
        names; equal if not given. Its length does not matter.
      theta: penalty, not negative; 0 gives the weighted sum.
      reference: :math:`z`, a point that is better than all that can be reached: one
        number for all tasks, or one per task.

    Returns:
      A balancer without state, of the cost of one backward pass. Needs `losses`. On the
      ray, where :math:`d_2` has no gradient, the weights are :math:`\hat w`.

    Raises:
      ValueError: if `theta` is negative, `reference` not finite, `preference` not one
        finite entry per task, none negative and not all zero, or `losses` are not
        passed to the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = pbi([3.0, 4.0])
      >>> print(tx.update(jnp.eye(2), tx.init(None), losses=jnp.array([6.0, 8.0]))[0])
      [0.6 0.8]

    References:
      MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, 2007,
      section II. At the ray we take zero for the gradient of the distance.
    """
    if theta < 0:
        raise ValueError(f"`theta` must not be negative, got {theta}.")
    point = np.asarray(reference, np.float32)
    if not np.all(np.isfinite(point)):
        raise ValueError(f"`reference` must be finite, got {reference}.")
    if preference is not None:
        check_preference(preference)

    def penalised_distance(losses, present):
        if point.shape not in ((), losses.shape):
            raise ValueError(
                "`reference` must be one number or one per task, got shape "
                f"{point.shape} for {len(losses)} tasks."
            )
        w = preferred(preference, present)
        w = w / jnp.maximum(safe_norm(w), 1e-30)
        offset = jnp.where(present, losses - point, 0.0)
        # Of degree one: in units of the largest entry no square overflows.
        unit = jax.lax.stop_gradient(jnp.max(jnp.abs(offset)))
        unit = jnp.where(unit > 0, unit, 1.0)
        scaled = offset / unit
        along = jnp.sum(scaled * w)
        across = scaled - along * w
        off_ray = jnp.max(jnp.abs(across)) > _ON_THE_RAY
        distance = safe_norm(jnp.where(off_ray, across, 0.0))
        return unit * (along + theta * distance)

    return scalarisation("pbi", penalised_distance)
