"""A small convolutional network without batch statistics."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class CNN(nn.Module):
    """Convolutions of stride 2 with LayerNorm over channels, and the mean over places.

    Every stage halves the picture. LayerNorm in place of BatchNorm: there are no
    running statistics that a merge would have to estimate again.

    Attributes:
      widths: channels of the stages.
      kernel: side of the convolutions in pixels.

    Example:
      >>> import jax
      >>> model = CNN(widths=(8, 16))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
      >>> model.apply({"params": params}, jnp.zeros((5, 28, 28, 1))).shape
      (5, 16)
    """

    widths: Sequence[int] = (32, 64, 128)
    kernel: int = 3

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch features"]:
        """The representation of images.

        Args:
          images: of any size; small ones end as a single place.

        Returns:
          One vector per image, as wide as the last stage.
        """
        x, side = images, (self.kernel, self.kernel)
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, side, strides=2, name=f"conv_{i}")(x)
            x = nn.gelu(nn.LayerNorm(name=f"norm_{i}")(x))
        return jnp.mean(x, axis=(1, 2))
