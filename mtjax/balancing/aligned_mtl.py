"""Aligned-MTL: independent component alignment."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from mtjax.balancing.balancer import (
    check_choice,
    check_preference,
    gramian_balancer,
)
from mtjax.balancing.solvers import full_precision


def aligned_mtl(
    *,
    scale_mode: Literal["min", "median", "rmse"] = "min",
    preference: ArrayLike | Sequence[float | int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the gradients orthogonal and equally long before it adds them up.

    With the eigenvalues :math:`\Lambda` and eigenvectors :math:`V` of the Gramian, the
    weights are :math:`\alpha = \sigma V \Lambda^{-1/2} V^\top p`: of all matrices with
    equal singular values :math:`\sigma`, that of the aligned gradients
    :math:`\hat G = \sigma V \Lambda^{-1/2} V^\top G` is the nearest to :math:`G`, and
    the direction is :math:`d = \hat G^\top p`.

    Args:
      scale_mode: :math:`\sigma` is the least of the singular values
        :math:`\sqrt{\lambda_i}` of :math:`G` ("min", which the paper's proof of
        convergence needs), their median ("median"), or the root of the mean of their
        squares ("rmse").
      preference: :math:`p`, one per task, none negative; ones if not given.

    Returns:
      A balancer without state. The paper's cheaper variant is this one on gradients at
      the shared representation, which `mtjax.value_and_task_grads` gives for a pair
      `(encode, losses_from_representation)`.

    Raises:
      ValueError: if `scale_mode` is unknown, or `preference` not one finite entry per
        task, none negative and not all zero.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = aligned_mtl()
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [1. 1.]

    References:
      Independent Component Alignment for Multi-Task Learning, 2023, equations 11 to 13
      ("min"); the other modes are those of its public code, which takes the lower of
      two middle values as the median. Eigenvalues below the rounding of a float32
      Gramian count as zero: about a thousandth of the longest gradient is the shortest
      that is seen.
    """
    check_choice("scale_mode", scale_mode, ("min", "median", "rmse"))
    if preference is not None:
        check_preference(preference)

    def weigh(gramian, step):
        wanted = jnp.ones(len(gramian), jnp.float32)
        if preference is not None:
            wanted = jnp.asarray(check_preference(preference, len(gramian)))
        weights = aligned_weights(gramian, wanted, scale_mode)
        return jnp.where(step.present, weights, 0.0)

    return gramian_balancer("aligned_mtl", weigh)


@full_precision
def aligned_weights(
    gramian: Float[Array, "tasks tasks"],
    preference: Float[Array, " tasks"],
    scale_mode: str,
) -> Float[Array, " tasks"]:
    """Weights of the sum of the aligned gradients.

    Args:
      gramian: inner products of the tasks' gradients.
      preference: weights of the aligned gradients.
      scale_mode: see `aligned_mtl`.

    Returns:
      Weights of any sign; zero if all gradients are.
    """
    size = len(gramian)
    # The weights do not depend on the scale of all gradients.
    largest = jnp.max(jnp.diagonal(gramian))
    matrix = gramian / jnp.where(largest > 0, largest, 1.0)
    values, vectors = jnp.linalg.eigh(matrix)
    precision = size * jnp.finfo(matrix.dtype).eps
    kept = values > precision * jnp.maximum(jnp.max(values), precision)
    count = jnp.maximum(jnp.sum(kept), 1)
    ascending = jnp.sort(jnp.where(kept, values, jnp.inf))
    scale = {
        "min": ascending[0],
        "median": ascending[(count - 1) // 2],
        "rmse": jnp.sum(jnp.where(kept, values, 0.0)) / count,
    }[scale_mode]
    ratios = jnp.where(kept, jnp.sqrt(scale / jnp.where(kept, values, 1.0)), 0.0)
    return vectors @ (ratios * (preference @ vectors))
