"""One vector of a sequence, such as a history of items; padding counts for nothing.

In all of them `mask` is True where the sequence has an entry, on whichever side padding
stands. What padding holds is not read, and a sequence without entries gives exactly 0.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.nn.gates import masked_softmax


def mean_pool(
    sequence: Float[Array, "*batch length width"], mask: Bool[Array, "*batch length"]
) -> Float[Array, "*batch width"]:
    """The mean of the entries.

    Args:
      sequence: vectors.
      mask: True where there is an entry.

    Returns:
      The mean; zeros where there is none.

    Example:
      >>> sequence = jnp.array([[1.0], [3.0], [9.0]])
      >>> print(mean_pool(sequence, jnp.array([True, True, False])))
      [2.]
    """
    count = jnp.sum(mask, axis=-1, keepdims=True)
    total = jnp.sum(_entries(sequence, mask), axis=-2)
    return total / jnp.maximum(count, 1)


class TargetAttention(nn.Module):
    r"""Weighs a history by what it has to do with a target (DIN).

    .. math:: o = \sum_l a_l h_l, \quad a_l = MLP([q, h_l, q - h_l, q \odot h_l])

    Attributes:
      hidden: widths of the MLP's hidden layers. The paper has 80 and 40.
      softmax: whether weights sum to 1. Without it, the paper's way, the sum tells how
        much of the history concerns the target.
      activation: of the hidden layers. The paper has Dice.

    Example:
      >>> import jax
      >>> history, target = jnp.ones((2, 5, 4)), jnp.ones((2, 4))
      >>> mask = jnp.array([[True] * 5, [False] * 5])
      >>> pool = TargetAttention()
      >>> variables = pool.init(jax.random.key(0), history, target, mask)
      >>> print(pool.apply(variables, history, target, mask)[1])
      [0. 0. 0. 0.]

    References:
      Deep Interest Network for Click-Through Rate Prediction, KDD 2018, equation 3.
      Deviation: ReLU for Dice.
    """

    hidden: tuple[int, ...] = (32,)
    softmax: bool = False
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(
        self,
        history: Float[Array, "batch length width"],
        target: Float[Array, "batch width"],
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch width"]:
        """The weighted sum.

        Args:
          history: vectors of what came before.
          target: the vector of the candidate.
          mask: True where there is an entry.

        Returns:
          One vector per example.
        """
        h = _entries(history, mask)
        q = jnp.broadcast_to(target[:, None], h.shape)
        x = jnp.concatenate([q, h, q - h, q * h], axis=-1)
        for i, width in enumerate(self.hidden):
            x = self.activation(nn.Dense(width, name=f"hidden_{i}")(x))
        logits = nn.Dense(1, name="logit")(x)[..., 0]
        if self.softmax:
            weights = masked_softmax(logits, mask)
        else:
            weights = jnp.where(mask, logits, 0.0)
        return jnp.einsum("bl,bld->bd", weights, h)


class TargetMultiHeadAttention(nn.Module):
    r"""Attention with the target as the only query.

    In each head :math:`softmax_l(\langle W_q q, W_k h_l \rangle / \sqrt{d}) W_v h_l`
    with the head's width d; a projection of all heads follows. No layer has a bias.

    Attributes:
      num_heads: number of heads, at least 1.
      width: of the outcome, a multiple of `num_heads`; that of the target if None.

    Raises:
      ValueError: if heads do not divide the width.

    Example:
      >>> import jax
      >>> history, target = jnp.ones((2, 5, 4)), jnp.ones((2, 4))
      >>> pool, mask = TargetMultiHeadAttention(2, width=8), jnp.ones((2, 5), bool)
      >>> variables = pool.init(jax.random.key(0), history, target, mask)
      >>> pool.apply(variables, history, target, mask).shape
      (2, 8)

    References:
      Attention Is All You Need, 2017, section 3.2.
    """

    num_heads: int = 2
    width: int | None = None

    @nn.compact
    def __call__(
        self,
        history: Float[Array, "batch length width"],
        target: Float[Array, "batch target"],
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch out"]:
        """What the target finds in the history; arguments as in `TargetAttention`."""
        width = target.shape[-1] if self.width is None else self.width
        attention = _Attention(self.num_heads, width, name="attention")
        return attention(target[:, None], _entries(history, mask), mask)[:, 0]


class SelfAttentionPooling(nn.Module):
    """Lets the entries look at each other, and takes the mean.

    Multi-head self-attention without biases, added to its input where widths agree;
    then `mean_pool`. Nothing tells positions apart: add their embeddings before.

    Attributes:
      num_heads: number of heads, at least 1.
      width: of the outcome, a multiple of `num_heads`; that of the sequence if None.

    Raises:
      ValueError: if heads do not divide the width.

    Example:
      >>> import jax
      >>> sequence, mask = jnp.ones((2, 5, 4)), jnp.ones((2, 5), bool)
      >>> pool = SelfAttentionPooling(2)
      >>> variables = pool.init(jax.random.key(0), sequence, mask)
      >>> pool.apply(variables, sequence, mask).shape
      (2, 4)
    """

    num_heads: int = 2
    width: int | None = None

    @nn.compact
    def __call__(
        self,
        sequence: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch out"]:
        """The mean of the attended entries.

        Args:
          sequence: vectors.
          mask: True where there is an entry.

        Returns:
          One vector per example.
        """
        width = sequence.shape[-1] if self.width is None else self.width
        x = _entries(sequence, mask)
        y = _Attention(self.num_heads, width, name="attention")(x, x, mask)
        return mean_pool(x + y if width == x.shape[-1] else y, mask)


class _Attention(nn.Module):
    """Multi-head attention over entries; without any, zeros."""

    num_heads: int
    width: int

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "batch queries inputs"],
        entries: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch queries out"]:
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(
                "`width` must be a multiple of `num_heads`, at least 1, got "
                f"{self.width!r} and {self.num_heads!r}."
            )
        head = self.width // self.num_heads

        def heads(name: str, x: Array) -> Array:
            dense = nn.DenseGeneral((self.num_heads, head), use_bias=False, name=name)
            return dense(x)

        q, k, v = (
            heads("query", queries),
            heads("key", entries),
            heads("value", entries),
        )
        logits = jnp.einsum("bqhd,blhd->bhql", q, k) / jnp.sqrt(head)
        weights = masked_softmax(logits, mask[:, None, None])
        found = jnp.einsum("bhql,blhd->bqhd", weights, v)
        out = nn.DenseGeneral(self.width, axis=(-2, -1), use_bias=False, name="out")
        return out(found)


def _entries(
    sequence: Float[Array, "*batch length width"], mask: Bool[Array, "*batch length"]
) -> Float[Array, "*batch length width"]:
    # Not a product: infinities in padding would become NaN.
    return jnp.where(mask[..., None], sequence, 0.0)
