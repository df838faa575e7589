"""The best of very many items, and the rank of the right one, block by block.

Scores are inner products of queries and items. Those of a block of items are all that
is in memory at a time: `(queries, block)` numbers, not `(queries, items)`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32


@functools.partial(jax.jit, static_argnames=("k", "block"))
def top_k_items(
    queries: Float[Array, "queries width"],
    items: Float[Array, "items width"],
    k: int,
    *,
    excluded: Bool[Array, " items"] | None = None,
    block: int = 8192,
) -> tuple[Float[Array, "queries k"], Int32[Array, "queries k"]]:
    """Finds the items with the highest scores.

    It is exact: what `jax.lax.top_k` says of all scores, items with equal scores in the
    order of their numbers.

    Args:
      queries: vectors.
      items: vectors of all items.
      k: how many, from 1 to the number of items.
      excluded: items that are not wanted, such as padding: their scores are minus
        infinity, and they come last.
      block: items at a time; at least k are taken.

    Returns:
      Scores, the highest first, and numbers of the items.

    Raises:
      ValueError: if `k` or `block` is out of range.

    Example:
      >>> items = jnp.array([[1.0], [3.0], [2.0], [3.0]])
      >>> scores, numbers = top_k_items(jnp.ones((1, 1)), items, 3, block=2)
      >>> print(scores, numbers)
      [[3. 3. 2.]] [[1 3 2]]
    """
    if not 1 <= k <= len(items):
        raise ValueError(
            f"`k` must be from 1 to the number of items, {len(items)}, got {k}."
        )
    scores_of, starts, block = _blocks(queries, items, excluded, max(block, k), block)

    def merge(best: Any, start: Array) -> tuple[Any, None]:
        scores, numbers = scores_of(start)
        # Earlier items stand in front: of equal scores, `top_k` takes the first.
        scores = jnp.concatenate([best[0], scores], axis=1)
        numbers = jnp.concatenate(
            [best[1], jnp.broadcast_to(numbers[None], (len(queries), block))], axis=1
        )
        scores, places = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(numbers, places, axis=1)), None

    scores, numbers = scores_of(starts[0])
    scores, places = jax.lax.top_k(scores, k)
    best = (scores, numbers[places])
    return jax.lax.scan(merge, best, starts[1:])[0]


@functools.partial(jax.jit, static_argnames=("block",))
def target_ranks(
    queries: Float[Array, "queries width"],
    items: Float[Array, "items width"],
    targets: Int[Array, " queries"],
    *,
    excluded: Bool[Array, " items"] | None = None,
    block: int = 8192,
) -> Float[Array, " queries"]:
    """Ranks the right item of every query among all items; 1 is the best.

    What `mtjax.training.full_ranks` says of all scores, on the device: items with equal
    scores share the mean of their ranks. Scores are computed twice, so that the right
    item's is exactly that with which the others are compared.

    Args:
      queries: vectors.
      items: vectors of all items.
      targets: number of the right item; beyond the items, the rank is NaN.
      excluded: items that are not ranked; the right item always is.
      block: items at a time.

    Returns:
      Ranks, multiples of one half, for `mtjax.training.top_k_metrics`. NaN where the
      right item's score is.

    Raises:
      ValueError: if `block` is below 1.

    Example:
      >>> items = jnp.array([[1.0], [3.0], [2.0], [3.0]])
      >>> print(target_ranks(jnp.ones((2, 1)), items, jnp.array([3, 2]), block=2))
      [1.5 3. ]
    """
    scores_of, starts, block = _blocks(queries, items, None, block, block)

    def find(own: Array, start: Array) -> tuple[Array, None]:
        scores, numbers = scores_of(start)
        # In the last block, what an earlier one had is minus infinity here.
        here = (numbers[None] == targets[:, None]) & (numbers >= start)[None]
        found = jnp.max(jnp.where(here, scores, -jnp.inf), axis=1)
        return jnp.where(jnp.any(here, axis=1), found, own), None

    own, _ = jax.lax.scan(find, jnp.full(len(queries), jnp.nan), starts)

    def count(counts: Any, start: Array) -> tuple[Any, None]:
        scores, numbers = scores_of(start)
        ranked = (numbers >= start)[None] & (numbers[None] != targets[:, None])
        if excluded is not None:
            ranked &= ~excluded[numbers][None]
        better, equal = counts
        better += jnp.sum(ranked & (scores > own[:, None]), axis=1)
        equal += jnp.sum(ranked & (scores == own[:, None]), axis=1)
        return (better, equal), None

    zeros = jnp.zeros(len(queries), jnp.int32)
    (better, equal), _ = jax.lax.scan(count, (zeros, zeros), starts)
    return jnp.where(jnp.isnan(own), jnp.nan, 1.0 + better + 0.5 * equal)


def _blocks(
    queries: Array, items: Array, excluded: Array | None, block: int, asked: int
) -> tuple[Callable[[Array], tuple[Array, Array]], Array, int]:
    """Scores and numbers of a block by its start, the starts, and the size."""
    if asked < 1:
        raise ValueError(f"`block` must be at least 1, got {asked}.")
    block = min(block, len(items))

    def scores_of(start: Array) -> tuple[Array, Array]:
        # The last block is as long as the others and begins earlier: a padded copy of
        # the items would take their memory again.
        first = jnp.minimum(start, len(items) - block)
        numbers = first + jnp.arange(block, dtype=jnp.int32)
        part = jax.lax.dynamic_slice_in_dim(items, first, block)
        scores = queries @ part.T
        counts = numbers >= start
        if excluded is not None:
            counts &= ~jax.lax.dynamic_slice_in_dim(excluded, first, block)
        return jnp.where(counts[None], scores, -jnp.inf), numbers

    return scores_of, jnp.arange(0, len(items), block, dtype=jnp.int32), block
