"""Sums of products to more digits than float32 has.

Cancellation in a residual loses what the rounding of its terms takes, and
ill-conditioned systems multiply the loss. Here products are split into parts that are
exact and their sums keep what rounding takes, so that about 36 bits count, on every
device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Sign, exponent and the leading half of the significand of a float32.
_LEADING_HALF = np.int32(-(1 << 12))


def two_sum(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The rounded sum, and what rounding took from it.

    References:
      Knuth, The Art of Computer Programming 2, 1969, section 4.2.2, theorem B.
    """
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def residual(
    rhs: Float[Array, " rows"],
    matrix: Float[Array, "rows columns"],
    x: Float[Array, " columns"],
    x_rest: Float[Array, " columns"],
) -> Float[Array, " rows"]:
    r"""The difference :math:`b - A (x + \delta)`, rounded once at its end.

    Args:
      rhs: :math:`b`.
      matrix: :math:`A`.
      x: :math:`x`.
      x_rest: :math:`\delta`, what rounding took from :math:`x`.

    Returns:
      The residual, with an error below 1e-10 of the terms of its sums.
    """
    total, rest = _residual(rhs, matrix, x, x_rest)
    return total + rest


def product(
    matrix: Float[Array, "rows columns"], x: Float[Array, " columns"]
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """The product of a matrix and a vector, and what rounding took from it."""
    total, rest = _residual(jnp.zeros_like(matrix[:, 0]), matrix, x, jnp.zeros_like(x))
    return two_sum(-total, -rest)


def _residual(rhs, matrix, x, x_rest):
    matrix_high, matrix_low = _split(matrix)
    x_high, x_low = _split(x)
    # Halves of 12 bits: these products are exact, with or without fused multiply-add.
    terms = jnp.concatenate([rhs[:, None], -matrix_high * x_high[None, :]], axis=1)
    rest = matrix_high * x_low[None, :] + matrix_low * x[None, :]
    rest = -jnp.sum(rest + matrix * x_rest[None, :], axis=1)
    while terms.shape[1] > 1:
        if terms.shape[1] % 2:
            terms = jnp.pad(terms, ((0, 0), (0, 1)))
        half = terms.shape[1] // 2
        terms, lost = two_sum(terms[:, :half], terms[:, half:])
        rest = rest + jnp.sum(lost, axis=1)
    return terms[:, 0], rest


def _split(x):
    """The leading half of the significand, and the rest; both exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    high = jax.lax.bitcast_convert_type(bits & _LEADING_HALF, jnp.float32)
    return high, x - high
