"""Model breadcrumbs: drop the smallest and the very largest changes."""

import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, chain, per_model, step
from mtjax.merging.order_statistics import number_kept, threshold
from mtjax.merging.task_arithmetic import task_arithmetic


def breadcrumbs(
    density: float = 0.9, outliers: float = 0.01, scale: float = 0.3
) -> Merger:
    r"""Task arithmetic on task vectors without their smallest and largest elements.

    Of every parameter the largest fraction $\gamma$ of elements by magnitude goes, of
    the others the largest stay.

    Args:
      density: fraction of all elements that stays, in (0, 1 - outliers].
      outliers: $\gamma$ in [0, 1), the fraction of largest elements that goes; 0
        drops none of them.
      scale: $\lambda$, factor of the sum.

    Returns:
      The method.

    Raises:
      ValueError: if the fractions do not fit together.

    References:
      Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with
      Sparse Masks", ECCV, 2024.
    """
    if not (0 <= outliers < 1 and 0 < density <= 1 - outliers + 1e-9):
        raise ValueError(
            "`outliers` must be in [0, 1) and `density` in (0, 1 - outliers], got "
            f"{outliers!r} and {density!r}."
        )

    def apply(leaf: Leaf, _, high, __, low):
        sizes = jnp.abs(leaf.vectors)
        inside = (sizes >= per_model(low, sizes)) & (sizes <= per_model(high, sizes))
        return jnp.where(inside, leaf.vectors, 0)

    def sizes(leaf: Leaf, *_):
        return jnp.abs(leaf.vectors)

    def last(size):
        return min(size, int(outliers * size) + number_kept(density, size))

    bounds = (
        *threshold(sizes, lambda size: min(size, int(outliers * size) + 1)),
        *threshold(sizes, last),
    )
    return chain(step(apply, *bounds, scope="tensor"), task_arithmetic(scale))
