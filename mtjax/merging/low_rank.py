"""Leaves of task vectors as products of two thin matrices."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class LowRank(NamedTuple):
    """A parameter of at least two axes as a product: `left @ right`.

    Attributes:
      left: `(*rows, rank)`; the rows are all axes of the parameter but the last one,
        which in kernels of Flax is that of the outputs.
      right: `(rank, columns)`.
    """

    left: Array
    right: Array

    def dense(self) -> Float[Array, "..."]:
        """The parameter, `(*rows, columns)`."""
        return jnp.matmul(self.left, self.right, precision="highest")


def rank_of(shape: tuple[int, ...], density: float) -> int:
    r"""How many singular triplets a share of them is: rounded down, at least one.

    Args:
      shape: of a parameter of at least two axes.
      density: the share, in (0, 1].

    Returns:
      $\max(1, \lfloor d \min(m, n) \rfloor)$ for m rows and n columns.

    Example:
      >>> rank_of((20, 30), 0.1), rank_of((3, 3, 8, 100), 0.5), rank_of((4, 4), 0.1)
      (2, 36, 1)
    """
    size = min(math.prod(shape[:-1]), shape[-1])
    # 0.29 * 100 is 28.999999999999996.
    return max(1, math.floor(round(density * size, 9)))


def low_rank(leaf: Float[Array, "..."], rank: int) -> LowRank:
    r"""The nearest product of this rank, by truncated singular value decomposition.

    $$L = U_r S_r, \quad R = V_r^\top, \qquad
    \|W - L R\|_F^2 = \sum_{i > r} \sigma_i^2$$

    and no other matrix of this rank is nearer (Eckart and Young).

    Args:
      leaf: $W$, of at least two axes, taken as a matrix with a column per entry of the
        last axis.
      rank: $r$, at least 1; more than the matrix has is cut to that.

    Returns:
      The product, in float32: r (m + n) numbers in place of m n.

    Raises:
      ValueError: if the leaf has fewer than two axes or the rank is below 1.

    Example:
      >>> product = low_rank(jnp.array([[3.0, 0.0], [0.0, 1.0]]), rank=1)
      >>> print(jnp.round(product.dense(), 6))
      [[3. 0.]
       [0. 0.]]
    """
    if jnp.ndim(leaf) < 2:
        raise ValueError(
            f"`leaf` must have at least two axes, got shape {jnp.shape(leaf)}; keep "
            "vectors as they are."
        )
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank!r}.")
    return _truncated(leaf, rank)


@partial(jax.jit, static_argnums=1)
def _truncated(leaf, rank: int) -> LowRank:
    *rows, columns = leaf.shape
    matrix = leaf.astype(jnp.float32).reshape(-1, columns)
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    left = u[:, :rank] * s[None, :rank]
    return LowRank(left.reshape(*rows, left.shape[1]), v[:rank])
