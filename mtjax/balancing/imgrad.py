"""IMGrad: imbalance-sensitive gradient descent."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import gramian_balancer
from mtjax.balancing.cagrad import check_ball, conflict_averse_weights
from mtjax.balancing.mgda import min_norm_weights
from mtjax.balancing.solvers import RIDGE, Info, full_precision, in_units
from mtjax.balancing.twofold import product

# Cosines closer to zero float32 cannot tell from it for vectors that nearly vanish.
_LEAST_COSINE = 1e-3


def imgrad(
    *, c: float = 0.5, rescale: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Corrects the mean gradient for fewer tasks the less it agrees with MGDA's.

    With the mean gradient :math:`g_0`, the direction :math:`g_m` of `mgda` and their
    cosine :math:`\gamma`, the weights are

    .. math:: w = \arg\min_{w \in \Delta} (\tfrac32 - \gamma) \langle g_w, g_0 \rangle
              + \gamma\, c \|g_0\| \|g_w\|, \qquad g_w = \sum_t w_t g_t,

    and as in `cagrad` :math:`d = g_0 + c \|g_0\| g_w / \|g_w\|`. That is the correction
    of `cagrad` for the radius :math:`c \gamma / (\tfrac32 - \gamma)`, stretched to the
    radius :math:`c`. With :math:`\gamma = \tfrac34` it is `cagrad`; the smaller
    :math:`\gamma`, the fewer tasks have a weight, up to the one that is hurt most.

    Args:
      c: radius of the ball, not negative; 0 gives the mean gradient.
      rescale: 0 leaves :math:`d` as it is, 1 divides it by :math:`1 + c^2`, 2 by
        :math:`1 + c`.

    Returns:
      A balancer without state. Where :math:`\gamma = 0`, as at Pareto-stationary points
      with :math:`g_m = 0`, the correction is along the gradient that opposes
      :math:`g_0` most, :math:`\arg\min_t \langle g_t, g_0 \rangle`. A task whose
      gradient is zero counts in the mean alone.

    Raises:
      ValueError: if `c` is negative or `rescale` not 0, 1 or 2.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = imgrad(c=0.5, rescale=0)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [0.75 0.75]

    References:
      Injecting Imbalance Sensitivity for Multi-Task Learning, 2025. The text gives the
      idea, to weigh by :math:`\gamma` how far the balance of the tasks counts; the
      objective above is that of the authors' public code for NYUv2, which is run there
      with `c=0.8`. It minimises by sequential programming what is solved exactly here.
      Cosines below 1e-3 count as that, the limit unless tasks are almost tied.
    """
    divisor = check_ball(c, rescale)

    def weigh(gramian, step):
        weights, _ = imbalance_sensitive_weights(gramian, step.present, c)
        return weights / divisor

    return gramian_balancer("imgrad", weigh)


def imbalance_sensitive_weights(
    gramian: Float[Array, "tasks tasks"], present: Bool[Array, " tasks"], c: float
) -> tuple[Float[Array, " tasks"], Info]:
    """Weights of the direction, before rescaling.

    Args:
      gramian: inner products of the tasks' gradients, zero for absent tasks.
      present: which tasks count in the mean gradient.
      c: radius of the ball relative to the mean gradient.

    Returns:
      The weights, and how well they solve the problem, see `conflict_averse_weights`.
    """
    gamma = jnp.clip(_cosine(gramian, present), _LEAST_COSINE, 1.0)
    return conflict_averse_weights(gramian, present, c, c * gamma / (1.5 - gamma))


@full_precision
def _cosine(gramian, present):
    """Of the mean gradient with the shortest vector in the hull; zero if one is."""
    matrix, units, active = in_units(gramian)

    def vector(weights):
        # As weights of gradients in units, the largest of them one: squares neither
        # overflow nor vanish.
        weights = jnp.where(active, weights, 0.0) * units
        return weights / jnp.maximum(jnp.max(weights), 1e-30)

    mean = vector(present.astype(gramian.dtype))
    shortest = vector(min_norm_weights(gramian)[0])
    along, across = product(matrix, mean)[0], product(matrix, shortest)[0]
    # Where a sum cancels its length is not less than float32 can tell from zero.
    square = jnp.maximum(shortest @ across, RIDGE * shortest @ shortest)
    length = jnp.sqrt(square) * jnp.sqrt(jnp.maximum(mean @ along, 0.0))
    return shortest @ along / jnp.where(length > 0, length, 1.0)
