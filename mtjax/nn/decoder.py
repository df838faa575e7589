"""A small causal transformer language model whose decoding keeps keys and values."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree


class KVCache(NamedTuple):
    """What a decoder remembers of the tokens it has read.

    Attributes:
      keys: per block, after their rotation.
      values: per block.
      valid: which slots hold a token that is not padding.
      used: how many slots are filled, padding among them.
    """

    keys: tuple[Float[Array, "batch slots heads features"], ...]
    values: tuple[Float[Array, "batch slots heads features"], ...]
    valid: Bool[Array, "batch slots"]
    used: Int[Array, ""]


class DecoderBlock(nn.Module):
    """A transformer block with rotary attention to the past, and normalisation first.

    Attributes:
      heads: of the attention.
      hidden: width of the MLP.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch new width"],
        positions: Int[Array, "batch new"],
        keys: Float[Array, "batch slots heads features"],
        values: Float[Array, "batch slots heads features"],
        used: Int[Array, ""],
        visible: Bool[Array, "batch new slots"],
    ):
        """Writes keys and values of the new tokens, lets these look at what is visible.

        Returns:
          The new tokens, all keys, all values.
        """
        batch, new, width = x.shape
        h = nn.LayerNorm(name="norm_attention")(x)
        split = lambda y: y.reshape(batch, new, self.heads, width // self.heads)
        query, key, value = (
            split(nn.Dense(width, name=name)(h)) for name in ("query", "key", "value")
        )
        write = lambda old, y: jax.lax.dynamic_update_slice(
            old, y.astype(old.dtype), (0, used, 0, 0)
        )
        keys, values = write(keys, rotate(key, positions)), write(values, value)
        mixed = jax.nn.dot_product_attention(
            rotate(query, positions), keys, values, mask=visible[:, None]
        )
        x = x + nn.Dense(width, name="output")(mixed.reshape(x.shape))
        h = nn.Dense(self.hidden, name="mlp_in")(nn.LayerNorm(name="norm_mlp")(x))
        return x + nn.Dense(width, name="mlp_out")(nn.gelu(h)), keys, values


class Decoder(nn.Module):
    """A causal language model with rotary positions.

    Three ways to call it give the same logits: `apply(variables, tokens)` reads whole
    sequences; `start` and `advance` read them piece by piece, as generation does, and
    are the two functions that `mtjax.nn.decoding.CachedModel` asks for.

    Padding may stand anywhere: masked tokens are not seen and take no position, so that
    a padded sequence has the logits of the sequence alone.

    Attributes:
      vocab: number of tokens; 256 for bytes.
      width: of the representation.
      depth: number of blocks, which are named `block_0`, `block_1`, …
      heads: of the attention; `width / heads` must be an even number.
      hidden: width of the MLPs; by default four times `width`.

    Raises:
      ValueError: if `heads` does not fit to `width`.

    Example:
      >>> model = Decoder(vocab=10, width=8, depth=1, heads=2)
      >>> tokens = jnp.array([[3, 1, 4, 1]])
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> cache = model.start(batch=1, slots=4)
      >>> _, cache = model.advance(params, cache, tokens[:, :3])
      >>> last, _ = model.advance(params, cache, tokens[:, 3:])
      >>> whole = model.apply({"params": params}, tokens)
      >>> bool(jnp.allclose(last[:, 0], whole[:, 3], atol=1e-5))
      True

    References:
      Vaswani et al., "Attention Is All You Need", 2017; Su et al., "RoFormer: Enhanced
      Transformer with Rotary Position Embedding", 2021.
    """

    vocab: int = 256
    width: int = 128
    depth: int = 4
    heads: int = 4
    hidden: int | None = None

    def setup(self):
        """Makes embedding, blocks, the last normalisation and the output layer."""
        hidden = 4 * self.width if self.hidden is None else self.hidden
        self.embed = nn.Embed(self.vocab, self.width)
        self.blocks = [
            DecoderBlock(self.heads, hidden, name=f"block_{i}")
            for i in range(self.depth)
        ]
        self.norm = nn.LayerNorm()
        self.output = nn.Dense(self.vocab, use_bias=False)

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens vocab"]:
        """Reads whole sequences.

        Args:
          tokens: in 0..vocab - 1.
          mask: False at padding.

        Returns:
          At every token the logits of the next one; meaningless at padding.
        """
        return self.extend(self.start(*tokens.shape), tokens, mask)[0]

    def extend(
        self,
        cache: KVCache,
        tokens: Int[Array, "batch new"],
        mask: Bool[Array, "batch new"] | None = None,
    ) -> tuple[Float[Array, "batch new vocab"], KVCache]:
        """Reads on, as `advance` of a bound module."""
        new, slots = tokens.shape[1], cache.valid.shape[1]
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        before = jnp.sum(cache.valid, axis=1, keepdims=True)
        positions = jnp.maximum(before + jnp.cumsum(mask, axis=1) - 1, 0)
        valid = jax.lax.dynamic_update_slice(cache.valid, mask, (0, cache.used))
        past = jnp.arange(slots)[None] <= cache.used + jnp.arange(new)[:, None]
        visible = past[None] & valid[:, None]
        x, keys, values = self.embed(tokens), [], []
        for block, key, value in zip(self.blocks, cache.keys, cache.values):
            x, key, value = block(x, positions, key, value, cache.used, visible)
            keys.append(key)
            values.append(value)
        cache = KVCache(tuple(keys), tuple(values), valid, cache.used + new)
        return self.output(self.norm(x)), cache

    @nn.nowrap
    def start(self, batch: int, slots: int) -> KVCache:
        """Makes an empty cache.

        Args:
          batch: number of sequences.
          slots: number of tokens that will be read in all, padding among them. What
            goes beyond overwrites the end without a warning.

        Returns:
          The cache.
        """
        if self.width % (2 * self.heads):
            raise ValueError(
                "`heads` must divide `width` into even numbers, got "
                f"{self.heads} and {self.width}."
            )
        empty = jnp.zeros((batch, slots, self.heads, self.width // self.heads))
        return KVCache(
            (empty,) * self.depth,
            (empty,) * self.depth,
            jnp.zeros((batch, slots), bool),
            jnp.zeros((), jnp.int32),
        )

    @nn.nowrap
    def advance(
        self,
        params: PyTree,
        cache: KVCache,
        tokens: Int[Array, "batch new"],
        mask: Bool[Array, "batch new"] | None = None,
    ) -> tuple[Float[Array, "batch new vocab"], KVCache]:
        """Reads on from where a cache ends.

        Args:
          params: of the model.
          cache: from `start` or from the last call.
          tokens: the new ones.
          mask: False at padding.

        Returns:
          At every new token the logits of the next one, and the longer cache.
        """
        bound = self.bind({"params": params})
        return bound.extend(cache, tokens, mask)


def rotate(
    x: Float[Array, "batch tokens heads features"],
    positions: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads features"]:
    r"""Turns pairs of features by angles that grow with the position.

    Pair :math:`i` of :math:`d / 2` is features :math:`i` and :math:`i + d / 2`, turned
    by :math:`m \cdot 10000^{-2i/d}` at position :math:`m`: the product of two vectors
    then depends on their distance only.

    Args:
      x: queries or keys, with an even number of features.
      positions: :math:`m`.

    Returns:
      The turned vectors.
    """
    half = x.shape[-1] // 2
    speeds = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[..., None, None] * speeds[None, None, None]
    a, b = x[..., :half], x[..., half:]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
