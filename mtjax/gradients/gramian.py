"""Inner products of task gradients, in float32 whatever their type."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.gradients._rows import Rows, union

# Measured by experiments/benchmarks/pullbacks.py on two CPU cores: one fused pass per
# pair of arrays that lie apart in memory is two to nine times faster up to here than
# one product of stacked arrays, and more accurate.
_MAX_PAIRED = 16


def gramian_of_pairs(
    pairs: Sequence[tuple[Rows, Rows]], num_tasks: int
) -> Float[Array, "tasks tasks"]:
    """The inner products of left with right rows, added up over the pairs.

    Args:
      pairs: left and right rows, such that the sum is symmetric.
      num_tasks: size of the matrix.

    Returns:
      The matrix, zero where no pair has rows.
    """
    total = jnp.zeros((num_tasks, num_tasks), jnp.float32)
    products: dict[tuple[int, int], list[Array]] = {}
    for left, right in pairs:
        tasks = union([left, right])
        if isinstance(left.values, list) and len(tasks) <= _MAX_PAIRED:
            for i, j in itertools.product(left.tasks, right.tasks):
                if i >= j:
                    product = _inner(left.of(i), right.of(j))
                    products.setdefault((i, j), []).append(product)
        else:
            where = jnp.array(tasks)
            block = _inner_of_all(left.stack(tasks), right.stack(tasks))
            total = total.at[where[:, None], where[None, :]].add(block)
    if products:
        i, j = jnp.array(list(products)).T
        total = total.at[i, j].add(jnp.stack([sum(p) for p in products.values()]))
    # Of pairs the lower half alone was taken.
    return jnp.tril(total) + jnp.tril(total, -1).T


def _inner(a: Array, b: Array) -> Float[Array, ""]:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


def _inner_of_all(a: Array, b: Array) -> Float[Array, "tasks tasks"]:
    # All trailing axes are contracted as they are: a reshape would make the compiler
    # gather arrays that are sharded over devices.
    kinds = {a.dtype, b.dtype}
    if len(kinds) > 1 or jnp.dtype(jnp.float64) in kinds:
        # A product may not be narrower than its factors, and they must be of one type.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    axes = tuple(range(1, a.ndim))
    return jax.lax.dot_general(
        a,
        b,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
