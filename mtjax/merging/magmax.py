"""MagMax: of every element the largest change."""

import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, chain, step
from mtjax.merging.task_arithmetic import scale as scaled


def magmax(scale: float = 1.0) -> Merger:
    """Takes every element from the model in which it changed most.

    Args:
      scale: factor of the result; the paper tunes it on validation data.

    Returns:
      The method.

    References:
      Marczak et al., "MagMax: Leveraging Model Merging for Seamless Continual
      Learning", ECCV, 2024.
    """

    def apply(leaf: Leaf):
        most, size = leaf.vectors[0], jnp.abs(leaf.vectors[0])
        for vector in jnp.unstack(leaf.vectors)[1:]:
            larger = jnp.abs(vector) > size
            most, size = (
                jnp.where(larger, vector, most),
                jnp.where(larger, jnp.abs(vector), size),
            )
        return most

    return chain(step(apply), scaled(scale))
