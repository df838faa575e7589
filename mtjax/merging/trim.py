"""Keep the largest changes."""

import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, Scope, per_model, step
from mtjax.merging.order_statistics import threshold


def trim(density: float, scope: Scope = "model") -> Merger:
    """Keeps the largest elements of every task vector and zeroes the others.

    Args:
      density: fraction that is kept, in (0, 1]. All elements that equal the smallest
        one kept are kept too.
      scope: `"model"`: the largest of the whole model, found exactly in two passes;
        `"tensor"`: of every parameter by itself.

    Returns:
      A step for `chain`.

    Raises:
      ValueError: if the density is not in (0, 1] or the scope unknown.

    References:
      First step of Yadav et al., "TIES-Merging", NeurIPS, 2023.
    """
    if not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density!r}.")
    sizes = threshold(lambda leaf, *_: jnp.abs(leaf.vectors), density)
    return step(_keep, *sizes, scope=scope)


def _keep(leaf: Leaf, _, smallest):
    size = jnp.abs(leaf.vectors)
    return jnp.where(size >= per_model(smallest, size), leaf.vectors, 0)
