"""A transformer over a sequence of vectors, and the mean of what it says."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.nn.bert import MaskedSelfAttention
from mtjax.nn.pooling import mean_pool


class SequenceEncoder(nn.Module):
    """One vector per sequence: positions are added, layers attend, the mean is taken.

    Attention looks both ways, so what shall be predicted must not be in the sequence.
    Layers normalise after every sum. The width is that of the sequence.

    Attributes:
      layers: number of transformer layers.
      heads: of the attention, a divisor of the width.
      hidden: width of the layers' MLP, with ReLU.
      dropout: rate, in [0, 1), of inputs and of what attention and MLP add.
      max_length: longest sequence.

    Raises:
      ValueError: if sequences are longer or `heads` does not divide their width.

    Example:
      >>> import jax
      >>> encoder = SequenceEncoder(layers=1, heads=2, hidden=8, max_length=5)
      >>> sequence, mask = jnp.ones((2, 3, 4)), jnp.array([[True] * 3, [False] * 3])
      >>> variables = encoder.init(jax.random.key(0), sequence, mask)
      >>> print(encoder.apply(variables, sequence, mask)[1])
      [0. 0. 0. 0.]
    """

    layers: int = 2
    heads: int = 2
    hidden: int = 512
    dropout: float = 0.1
    max_length: int = 100

    @nn.compact
    def __call__(
        self,
        sequence: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch width"]:
        """The vector of every sequence.

        Args:
          sequence: vectors, the oldest first.
          mask: True where there is an entry. Padding may stand on either side: places
            are counted among the entries.
          train: whether to drop; needs `rngs={"dropout": key}`.

        Returns:
          One vector per sequence; zeros for one without entries.
        """
        length, width = sequence.shape[1:]
        if length > self.max_length:
            raise ValueError(
                f"`sequence` must have at most `max_length` = {self.max_length} "
                f"entries, got {length}: cut off the oldest."
            )
        if width % self.heads:
            raise ValueError(
                f"`heads` must divide the width, got {self.heads} and {width}."
            )
        init = nn.initializers.normal(0.02)
        positions = self.param("positions", init, (self.max_length, width))
        place = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = drop(jnp.where(mask[..., None], sequence + positions[place], 0.0))
        for i in range(self.layers):
            attention = MaskedSelfAttention(self.heads, name=f"attention_{i}")
            x = nn.LayerNorm(name=f"attention_norm_{i}")(x + drop(attention(x, mask)))
            h = nn.relu(nn.Dense(self.hidden, name=f"mlp_in_{i}")(x))
            h = nn.Dense(width, name=f"mlp_out_{i}")(h)
            x = nn.LayerNorm(name=f"mlp_norm_{i}")(x + drop(h))
        return mean_pool(x, mask)
