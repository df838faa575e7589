"""Softmax over the largest logits only, which does not forget the others."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from mtjax.nn.gates import masked_softmax


def sparse_softmax(
    logits: Float[Array, "*rows patterns"], top_k: int
) -> Float[Array, "*rows patterns"]:
    r"""Softmax over the K largest logits; the others are 0 but hear of the loss.

    .. math:: \alpha_g = \frac{m_g e^{l_g}}{\sum_h m_h e^{l_h}}

    where the mask m is 1 for the K largest logits, the first of equal ones. For these
    the gradient is exact. The mask has no derivative: for a logit outside, the
    gradient is that of its entry with :math:`m_g = 1` and the sum as it is (straight
    through), so that a pattern may come back.

    Args:
      logits: finite.
      top_k: K, from 1 to the number of patterns.

    Returns:
      Weights that sum to 1, with at most K above 0.

    Raises:
      ValueError: if `top_k` is out of range.

    Example:
      >>> print(sparse_softmax(jnp.array([0.0, 2.0, 2.0, 1.0]), 2))
      [0.  0.5 0.5 0. ]
    """
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(
            f"`top_k` must be from 1 to the number of logits, {logits.shape[-1]}, got "
            f"{top_k!r}."
        )
    order = np.arange(logits.shape[-1])
    mine, other = logits[..., :, None], logits[..., None, :]
    first = jnp.asarray(order[None] < order[:, None])
    first = jnp.broadcast_to(first, (*logits.shape, len(order)))
    # Counting is faster than sorting, for as few as there are.
    mask = jnp.sum((other > mine) | ((other == mine) & first), axis=-1) < top_k
    kept = masked_softmax(logits, mask)
    lowest = jnp.finfo(logits.dtype).min
    total = jax.nn.logsumexp(jnp.where(mask, logits, lowest), axis=-1, keepdims=True)
    # At most 1 where it counts: a logit outside is below those of the sum.
    left = jnp.exp(
        jnp.minimum(jnp.where(mask, lowest, logits) - stop_gradient(total), 0)
    )
    change = left - stop_gradient(kept) * jnp.sum(left, axis=-1, keepdims=True)
    return kept + change - stop_gradient(change)
