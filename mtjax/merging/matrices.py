"""Parameters as matrices, for methods that look at singular vectors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.merging.merger import Leaf, Merger, add_up, step


def on_matrices(
    merge: Callable[[Float[Array, "models out rest"]], Float[Array, "out rest"]],
    out_axis: int,
) -> Merger:
    """A method that merges matrices, and averages all parameters of fewer axes.

    Args:
      merge: from the task vectors of one parameter, as matrices with a row per output,
        to their combination.
      out_axis: axis of the output features of a parameter: -1 for kernels of Flax,
        also those of convolutions (all other axes become the columns); 0 for PyTorch.

    Returns:
      The method.
    """

    def apply(leaf: Leaf):
        if leaf.base.ndim < 2:
            return add_up(leaf.vectors) / len(leaf.vectors)
        merged = merge(to_matrices(leaf.vectors, out_axis))
        return from_matrices(merged[None], leaf.base.shape, out_axis)[0]

    return step(apply, elementwise=False)


def to_matrices(
    vectors: Float[Array, "models ..."], out_axis: int
) -> Float[Array, "models out rest"]:
    """Every vector as a matrix with a row per output."""
    rows = jnp.moveaxis(vectors, 1 + out_axis % (vectors.ndim - 1), 1)
    return rows.reshape(*rows.shape[:2], -1)


def from_matrices(
    matrices: Float[Array, "models out rest"], shape: tuple[int, ...], out_axis: int
) -> Float[Array, "models ..."]:
    """Undoes `to_matrices`."""
    place = out_axis % len(shape)
    rest = shape[:place] + shape[place + 1 :]
    rows = matrices.reshape(*matrices.shape[:2], *rest)
    return jnp.moveaxis(rows, 1, 1 + place)


def one_by_one(
    decompose: Callable[[Float[Array, "m n"]], Any], matrices: Float[Array, "batch m n"]
) -> Any:
    """Decomposes matrices one after the other, as `jax.vmap` would all at once.

    jaxlib splits a batch over the threads of a CPU and waits for them. Where there are
    two threads, two batches in one program wait for each other for ever (0.10.2).

    Args:
      decompose: such as `jnp.linalg.svd`.
      matrices: what it is called with.

    Returns:
      What it returns, with the axis of the batch in front.
    """
    return jax.lax.map(decompose, matrices)


def thin_svd(matrix: Float[Array, "m n"]) -> tuple[Array, Array, Array]:
    """Left vectors, values and right vectors (as rows), as many as there are values."""
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def orthogonalised(matrix: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """The nearest matrix with orthonormal columns (or rows): the polar factor."""
    u, _, v = thin_svd(matrix)
    return u @ v
