"""DARE: drop at random and rescale."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt16

from mtjax.merging.merger import Leaf, Merger, step

BLOCK = 1 << 14  # elements that share a key; pieces begin at multiples of it


def dare(drop_rate: float = 0.9) -> Merger:
    r"""Drops elements of task vectors at random and makes up for them.

    $$\tilde\tau = m \odot \tau / (1 - p), \quad m \sim \mathrm{Bernoulli}(1 - p)$$

    Args:
      drop_rate: $p$ in [0, 1). Drawn in steps of 1/65536, with the exact expectation.

    Returns:
      A step for `chain`, in front of `task_arithmetic` or `ties`; needs `key`. A leaf
      draws the same numbers whether it is merged in memory or from a file.

    Raises:
      ValueError: if the rate is not in [0, 1).

    References:
      Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous
      Models as a Free Lunch", ICML, 2024.
    """
    if not 0 <= drop_rate < 1:
        raise ValueError(f"`drop_rate` must be in [0, 1), got {drop_rate!r}.")
    levels = 1 << 16
    dropped = min(round(drop_rate * levels), levels - 1)

    def apply(leaf: Leaf):
        kept = leaf.vectors * (levels / (levels - dropped))
        return jnp.where(_bits(leaf) >= dropped, kept, 0)

    return step(apply, needs_key=True)


def _bits(leaf: Leaf) -> UInt16[Array, "models ..."]:
    """Random bits of every element: the same however the parameter is cut."""
    models, size = len(leaf.vectors), leaf.vectors[0].size
    block = min(BLOCK, size)
    numbers = leaf.offset // BLOCK + jnp.arange(-(-size // block))

    def draw(model, number):
        key = jax.random.fold_in(jax.random.fold_in(leaf.key, model), number)
        # Two numbers per word: for numbers of 16 bits, JAX would hash as many words.
        words = jax.random.bits(key, (BLOCK // 2,), jnp.uint32)
        return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:block]

    drawn = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(jnp.arange(models), numbers)
    return drawn.reshape(models, -1)[:, :size].reshape(leaf.vectors.shape)
