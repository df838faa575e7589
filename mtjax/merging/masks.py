"""Trees of booleans: which elements of a task vector to take."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Shaped, UInt8

from mtjax.merging.merger import Merger, chain
from mtjax.merging.task_arithmetic import task_arithmetic
from mtjax.merging.trim import trim


def pack_mask(mask: PyTree) -> UInt8[Array, " bytes"]:
    """Eight booleans per byte, over all leaves together.

    Args:
      mask: a tree of booleans, in which `None` is no leaf.

    Returns:
      The bytes; the last one is filled up with zeros.

    Example:
      >>> print(pack_mask({"a": jnp.array([[True]]), "b": jnp.array([False, True])}))
      [160]
    """
    bits = [jnp.ravel(leaf) for leaf in jax.tree.leaves(mask)]
    return jnp.packbits(jnp.concatenate(bits))


def unpack_mask(packed: UInt8[Array, " bytes"], like: PyTree) -> PyTree:
    """The inverse of `pack_mask`.

    Args:
      packed: the bytes.
      like: a tree with the structure and the shapes of the mask.

    Returns:
      A tree of booleans.
    """
    leaves, structure = jax.tree.flatten(like)
    sizes = [np.size(leaf) for leaf in leaves]
    # Without the count, the zeros at the end would be taken for elements.
    bits = jnp.unpackbits(packed, count=sum(sizes)).astype(bool)
    parts = jnp.split(bits, np.cumsum(sizes)[:-1].tolist())
    shaped = [part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves)]
    return jax.tree.unflatten(structure, shaped)


def masked(vector: PyTree, mask: PyTree) -> PyTree:
    """The vector where the mask is true, 0 elsewhere; both are trees alike."""

    def leaf(x: Shaped[Array, "..."], keep: Bool[Array, "..."]):
        return jnp.where(keep, x, 0)

    return jax.tree.map(leaf, vector, mask)


def magnitude_mask(vector: PyTree, density: float = 0.1) -> PyTree:
    """Where a task's own vector is largest: the baseline that ignores other tasks.

    Args:
      vector: of the task.
      density: fraction of all elements of the model, in (0, 1].

    Returns:
      A tree of booleans; elements that are zero are not taken.
    """
    zeros = jax.tree.map(jnp.zeros_like, vector)
    return jax.tree.map(lambda x: x != 0, _largest(density).vector(zeros, [vector]))


def density_of(mask: PyTree) -> float:
    """The fraction of elements that a mask takes."""
    taken = sum(int(jnp.sum(leaf)) for leaf in jax.tree.leaves(mask))
    return taken / sum(leaf.size for leaf in jax.tree.leaves(mask))


@cache
def _largest(fraction: float) -> Merger:
    # One object per fraction: programs are compiled per object.
    return chain(trim(fraction), task_arithmetic(1.0))
