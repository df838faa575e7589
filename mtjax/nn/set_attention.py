"""Attention from one set to another: the block of the Set Transformer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.nn.gates import masked_softmax


class SetAttention(nn.Module):
    r"""Lets the rows of one set read those of another (MAB).

    .. math:: Z = LN(X + MultiHead(X, Y, Y)), \quad MAB(X, Y) = LN(Z + FFN(Z))

    Each row is normalised over its own width. The projections of the attention have no
    bias; FFN is one hidden layer with ReLU. The weights of the attention are sown as
    `"attention"` of shape `(batch, heads, queries, entries)` in `"intermediates"`.

    With m learned vectors I, `MAB(X, MAB(I, X))` is attention within X that costs
    :math:`O(|X| m)` instead of :math:`O(|X|^2)`: induced set attention.

    Attributes:
      heads: of the attention, a divisor of the width.
      hidden: width of FFN's hidden layer; twice the width of the rows if None.

    Raises:
      ValueError: if heads do not divide the width.

    Example:
      >>> import jax
      >>> fields, groups = jnp.ones((2, 5, 4)), jnp.ones((3, 4))
      >>> block = SetAttention(heads=2)
      >>> variables = block.init(jax.random.key(0), groups, fields)
      >>> block.apply(variables, groups, fields).shape
      (2, 3, 4)

    References:
      Set Transformer, ICML 2019, equations 6 to 9.
    """

    heads: int = 2
    hidden: int | None = None

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "batch queries width"] | Float[Array, "queries width"],
        entries: Float[Array, "batch entries width"],
        present: Bool[Array, "batch entries"] | None = None,
    ) -> Float[Array, "batch queries width"]:
        """What every query makes of the entries.

        Args:
          queries: X; without a batch they are the same for every example.
          entries: Y; finite.
          present: True where there is an entry. Others are neither keys nor values; a
            query without any reads zeros. All are present if None.

        Returns:
          One row per query.
        """
        width, heads = queries.shape[-1], self.heads
        if heads < 1 or width % heads:
            raise ValueError(
                f"`heads` must be a divisor of the width, {width}, got {heads!r}."
            )
        split = lambda y: y.reshape(*y.shape[:-1], heads, width // heads)
        dense = lambda name, n=width: nn.Dense(n, use_bias=False, name=name)
        q, k, v = (
            split(dense(name)(y))
            for name, y in (("query", queries), ("key", entries), ("value", entries))
        )
        # Queries without a batch are one matrix, with which all entries are multiplied.
        terms = "qhd,blhd->bhql" if queries.ndim == 2 else "bqhd,blhd->bhql"
        logits = jnp.einsum(terms, q, k) / (width // heads) ** 0.5
        if present is None:
            present = jnp.ones(entries.shape[:2], bool)
        weights = masked_softmax(logits, present[:, None, None])
        self.sow("intermediates", "attention", weights)
        found = jnp.einsum("bhql,blhd->bqhd", weights, v)
        found = dense("out")(found.reshape(*found.shape[:2], width))
        if queries.ndim == 2:
            queries = queries[None]
        z = nn.LayerNorm(name="norm_attention")(queries + found)
        h = nn.relu(nn.Dense(self.hidden or 2 * width, name="hidden")(z))
        return nn.LayerNorm(name="norm")(z + nn.Dense(width, name="ffn")(h))
