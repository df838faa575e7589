"""Inner products of task gradients, in float32 whatever their type."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.gradients._rows import Rows, union

# Measured by experiments/benchmarks/gramian.py on a CPU: up to here one fused pass per
# pair of arrays is fastest.
_MAX_PAIRED = 4
# With more, a loop over blocks that fit the cache: as fast for 8 tasks and 2.5 times
# faster for 16, and 7 times faster than one product of stacked arrays, which the CPU
# compiler lays out anew first.
_BLOCK = 8192


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
        if jax.default_backend() == "cpu" and len(tasks) <= _MAX_PAIRED:
            for i, j in itertools.product(left.tasks, right.tasks):
                if i >= j:
                    product = _inner(left.of(i), right.of(j))
                    products.setdefault((i, j), []).append(product)
            continue
        if jax.default_backend() == "cpu":
            block = _in_blocks(left, right, tasks)
        else:
            block = _inner_of_all(left.stack(tasks), right.stack(tasks))
        where = jnp.array(tasks)
        total = total.at[where[:, None], where[None, :]].add(block)
    if products:
        i, j = jnp.array(list(products)).T
        sums = [functools.reduce(jnp.add, terms) for terms in products.values()]
        total = total.at[i, j].add(jnp.stack(sums))
    # Of pairs the lower half alone was taken.
    return jnp.tril(total) + jnp.tril(total, -1).T


def _inner(a: Array, b: Array) -> Float[Array, ""]:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


def _in_blocks(
    left: Rows, right: Rows, tasks: tuple[int, ...]
) -> Float[Array, "tasks tasks"]:
    size = left.of(tasks[0]).size
    width = min(size, _BLOCK)
    sides = [_columns(rows, tasks) for rows in (left, right)]

    def product(start, width):
        return _inner_of_all(*(columns(start, width) for columns in sides))

    first = product(0, width)
    whole, rest = divmod(size, max(width, 1))
    total = jax.lax.fori_loop(
        1, whole, lambda i, total: total + product(i * width, width), first
    )
    return total if rest == 0 else total + product(size - rest, rest)


def _columns(
    rows: Rows, tasks: tuple[int, ...]
) -> Callable[[Any, int], Float[Array, "tasks width"]]:
    """Reads some columns of the matrix of all tasks' rows."""
    cut = jax.lax.dynamic_slice_in_dim
    if rows.tasks == tasks and not isinstance(rows.values, list):
        matrix = rows.values.reshape(len(tasks), -1)
        return lambda start, width: cut(matrix, start, width, axis=1)
    flat = [rows.of(k).reshape(-1) for k in tasks]
    return lambda start, width: jnp.stack([cut(x, start, width) for x in flat])


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
