"""A multi-layer perceptron."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float


class MLP(nn.Module):
    """Dense layers with ReLU after each.

    Attributes:
      widths: width of each layer; the last is that of the representation.
    """

    widths: Sequence[int] = (128, 64)

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch width"]:
        """Encodes feature vectors."""
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return x
