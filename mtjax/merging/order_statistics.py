"""Exact order statistics, of one parameter or of a whole model, without sorting.

The bits of a float32, with the sign mended, are in the order of the floats when read as
an integer. A histogram of the upper 16 bits says in which bin the k-th largest lies, a
second one of the lower 16 bits inside that bin says which float it is.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from mtjax.merging.merger import Total, per_model

_BINS = 1 << 16  # per pass


def number_kept(fraction: float, size: int) -> int:
    """How many of `size` elements a fraction is: rounded up, at least one."""
    return min(size, max(1, math.ceil(fraction * size)))


def threshold(
    values: Callable[..., Float[Array, "rows ..."]], rank: float | Callable[[int], int]
) -> tuple[Total, Total]:
    """Totals that find the value of a given rank, per row.

    Args:
      values: from a leaf and earlier totals to finite numbers, a row per model.
      rank: from the number of elements to k, for the k-th largest; or the fraction of
        elements that reach the value, in [0, 1] (0: the largest element).

    Returns:
      Two totals, for two passes; the result of the second is `(rows,)`.
    """
    kth = rank if callable(rank) else partial(number_kept, rank)
    return (
        Total(
            lambda *known: _count(_ordered(values(*known)) >> 16),
            lambda counts, size, *_: _search(counts, kth(size)),
        ),
        Total(
            lambda *known: _count_inside(_ordered(values(*known[:-1])), known[-1][0]),
            lambda counts, size, *known: _value(counts, *known[-1]),
        ),
    )


def _ordered(values: Float[Array, "rows ..."]) -> UInt32[Array, "rows ..."]:
    """Integers in the order of the values."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    negative = (bits >> 31).astype(bool)
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _count(bins):
    rows = jnp.unstack(bins.astype(jnp.int32))
    return jnp.stack([jnp.bincount(row.ravel(), length=_BINS) for row in rows])


def _count_inside(ranks, bins):
    inside = (ranks >> 16) == per_model(bins, ranks).astype(jnp.uint32)
    low = jnp.where(inside, ranks & 0xFFFF, _BINS).astype(jnp.int32)
    rows = [jnp.bincount(row.ravel(), length=_BINS + 1) for row in jnp.unstack(low)]
    return jnp.stack(rows)[:, :_BINS]


def _search(counts, k):
    """The bin that holds the k-th largest, and its rank counted from that bin's top."""
    xp = counts.__array_namespace__()
    reached = xp.flip(xp.cumulative_sum(xp.flip(counts, axis=1), axis=1), axis=1)
    rank = k if isinstance(k, int) else k[:, None]
    place = xp.sum(reached >= rank, axis=1) - 1
    above = xp.take_along_axis(reached - counts, place[:, None], axis=1)[:, 0]
    return place, k - above


def _value(counts, bins, rest):
    low, _ = _search(counts, rest)
    xp = counts.__array_namespace__()
    ranks = (bins.astype(xp.uint32) << 16) | low.astype(xp.uint32)
    bits = xp.where((ranks >> 31) == 0, ~ranks, ranks & xp.uint32((1 << 31) - 1))
    if isinstance(bits, np.ndarray):
        return bits.view(np.float32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
