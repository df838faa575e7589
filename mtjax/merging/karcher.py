"""The Karcher mean: the average of more than two models on the sphere."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.merging.merger import Leaf, Merger, Total, combined, step
from mtjax.merging.slerp import inner_products
from mtjax.merging.task_arithmetic import check_one_each

_STEPS, _CLOSE = 100, 1e-7  # of the iteration, and the step (radians) that ends it


def karcher(weights: Sequence[float | int] | None = None) -> Merger:
    r"""The point on the sphere whose squared angles to all models are least in sum.

    Models are scaled to unit length over all merged parameters; the mean direction gets
    the mean length. The mean lies in the span of the models, so that all steps (log
    map, average, exponential map) are done on weights, with the inner products of the
    models alone. Of two models with equal weights it is `slerp(0.5)` of their
    directions.

    Args:
      weights: one positive number per model (names sorted); equal by default.

    Returns:
      The method; needs no base.

    Raises:
      ValueError: if a weight is not positive.

    References:
      Karcher, "Riemannian center of mass and mollifier smoothing", 1977.
    """
    given = None if weights is None else jnp.asarray(weights, jnp.float32)
    if given is not None and (given.ndim != 1 or not jnp.all(given > 0)):
        raise ValueError(f"`weights` must be positive numbers, got {weights!r}.")

    def points(leaf: Leaf):
        return leaf.vectors + leaf.base[None]

    def products(leaf: Leaf):
        if given is not None:
            check_one_each("weights", given, leaf)
        return inner_products(points(leaf))

    def shares(products, size):
        products = jnp.asarray(products, jnp.float32)
        number = len(products)
        lengths = jnp.sqrt(jnp.diagonal(products))
        scale = jnp.where(lengths > 0, lengths, 1)
        parts = jnp.ones(number) if given is None else given
        parts = parts / jnp.sum(parts)
        unit = products / jnp.outer(scale, scale)
        return _mean(unit, parts) / scale * jnp.vdot(parts, lengths)

    def apply(leaf: Leaf, weights):
        return combined(weights, points(leaf)) - leaf.base

    return step(apply, Total(products, shares), needs_base=False)


def _mean(
    cosines: Float[Array, "models models"], parts: Float[Array, " models"]
) -> Float[Array, " models"]:
    """Weights of the unit vectors for their mean on the sphere."""

    def normalised(weights):
        square = weights @ cosines @ weights
        return weights / jnp.sqrt(jnp.where(square > 1e-12, square, 1))

    def move(state):
        weights, _, steps = state
        cosine = jnp.clip(cosines @ weights, -1, 1)
        angle = jnp.arccos(cosine)
        sine = jnp.sin(angle)
        stretch = jnp.where(sine > 1e-4, angle / jnp.where(sine > 1e-4, sine, 1), 1)
        tangent = parts * stretch - jnp.vdot(parts * stretch, cosine) * weights
        length = jnp.sqrt(jnp.maximum(tangent @ cosines @ tangent, 0))
        turn = jnp.where(
            length > 0, jnp.sin(length) / jnp.where(length > 0, length, 1), 1
        )
        return normalised(jnp.cos(length) * weights + turn * tangent), length, steps + 1

    def moving(state):
        _, length, steps = state
        return (length > _CLOSE) & (steps < _STEPS)

    start = (normalised(parts), jnp.float32(jnp.inf), 0)
    return jax.lax.while_loop(moving, move, start)[0]
