"""Vectors of length 1, whose inner products are cosines."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_vectors(x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    r"""Divides vectors by their length: :math:`x / \|x\|_2`.

    Args:
      x: vectors.

    Returns:
      Vectors of length 1; zeros where there are only zeros, with a finite gradient.

    Example:
      >>> print(unit_vectors(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      [[0.6 0.8]
       [0.  0. ]]
    """
    # Away from zero, where a length has no gradient.
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
