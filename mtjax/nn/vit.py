"""A small vision transformer made of dense layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class SelfAttention(nn.Module):
    """Multi-head self-attention whose four projections are plain matrices.

    `flax.linen.MultiHeadDotProductAttention` keeps heads in an axis of their own. Here
    kernels have the shape `(width, width)`, so that methods which look at the matrices
    of a model (ghost products, singular vectors) find them.

    Attributes:
      heads: number of heads, a divisor of the width.
    """

    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """Lets every token look at all tokens."""
        width = x.shape[-1]
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, width // self.heads)
        queries, keys, values = (
            split(nn.Dense(width, name=name)(x)) for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(queries, keys, values)
        return nn.Dense(width, name="output")(mixed.reshape(x.shape))


class Block(nn.Module):
    """A transformer block that normalises before attention and before its MLP.

    Attributes:
      heads: of the attention.
      hidden: width of the MLP.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """Adds what attention and MLP say."""
        x = x + SelfAttention(self.heads, name="attention")(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(self.hidden, name="mlp_in")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="mlp_out")(h)


class ViT(nn.Module):
    """A vision transformer: patches, blocks with LayerNorm, the mean of all tokens.

    It has no convolution (patches are cut by a reshape), so that it may run in
    `jax.lax.scan` on CPUs, and no batch statistics, so that models can be merged.

    Attributes:
      patch: side of a square patch in pixels; divides the sides of the image.
      width: of tokens and of the representation.
      depth: number of blocks, which are named `block_0`, `block_1`, …
      heads: of the attention, a divisor of the width.
      hidden: width of the blocks' MLP.

    Raises:
      ValueError: if `patch` does not divide the image, or `heads` the width.

    Example:
      >>> model = ViT(patch=7, width=16, depth=2, heads=2, hidden=32)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
      >>> params["block_1"]["attention"]["query"]["kernel"].shape
      (16, 16)

    References:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; the mean of the
      tokens in place of a class token.
    """

    patch: int = 7
    width: int = 64
    depth: int = 4
    heads: int = 4
    hidden: int = 128

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width depth"]
    ) -> Float[Array, "batch features"]:
        """Encodes images with values in about [0, 1]."""
        batch, height, width, channels = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"`patch` must divide the sides of the image, {height} and {width}, "
                f"got {self.patch}."
            )
        if self.width % self.heads:
            raise ValueError(
                f"`heads` must divide `width`, got {self.heads} and {self.width}."
            )
        rows, columns = height // self.patch, width // self.patch
        x = images.reshape(batch, rows, self.patch, columns, self.patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        x = nn.Dense(self.width, name="patches")(x)
        place = self.param(
            "positions", nn.initializers.normal(0.02), (rows * columns, self.width)
        )
        x = x + place[None]
        for i in range(self.depth):
            x = Block(self.heads, self.hidden, name=f"block_{i}")(x)
        return jnp.mean(nn.LayerNorm(name="norm")(x), axis=1)
