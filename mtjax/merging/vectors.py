"""Task vectors as trees, and their differentiable combination with a base."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PyTree

from mtjax.merging.match import (
    Where,
    by_name,
    check_match,
    named_leaves,
)


def task_vectors(
    base: PyTree,
    models: Mapping[str, PyTree] | Sequence[PyTree],
    *,
    where: Where = None,
    dtype: DTypeLike = jnp.float32,
) -> PyTree:
    r"""What fine-tuning changed: $\tau_t = \theta_t - \theta_0$ for every model.

    Args:
      base: $\theta_0$, any pytree of arrays.
      models: $\theta_t$, trees like the base, by name (taken in the order of the names)
        or in a sequence.
      where: which leaves; see `Merger`.
      dtype: of the result; differences are taken in float32 first.

    Returns:
      A tree like the base; leaves have a leading axis of models. `None` at leaves that
      `where` does not choose or that are not floating point.

    Raises:
      ValueError: if models do not match the base; all differences are listed.

    Example:
      >>> base = {"w": jnp.ones(2), "step": jnp.array(3)}
      >>> task_vectors(base, {"a": {"w": jnp.zeros(2), "step": jnp.array(9)}})["w"]
      Array([[-1., -1.]], dtype=float32)
    """
    columns = {name: named_leaves(m) for name, m in by_name(models).items()}
    reference = named_leaves(base)
    paths = set(check_match(reference, columns, where))

    def rows(path, start):
        if path not in paths:
            return None
        start = jnp.asarray(start, jnp.float32)
        found = [jnp.asarray(c[path], jnp.float32) - start for c in columns.values()]
        return jnp.stack([row.astype(dtype) for row in found])

    leaves = [rows(path, start) for path, start in reference.items()]
    return jax.tree.unflatten(jax.tree.structure(base), leaves)


def merge(
    base: PyTree,
    vectors: PyTree,
    coefficients: PyTree | Float[Array, " models"] | float,
) -> PyTree:
    r"""The base plus a linear combination of task vectors, in one differentiable step.

    $$\theta^\ell = \theta_0^\ell + \sum_t \lambda_t^\ell \odot \tau_t^\ell$$

    Everything that learns how to merge calls this inside its loss. The gradient of a
    coefficient is $\langle \partial L / \partial \theta^\ell, \tau_t^\ell \rangle$.

    Args:
      base: $\theta_0$.
      vectors: what `task_vectors` returned; may be bfloat16, sums are float32.
      coefficients: one array for all leaves, or a tree of them that has the structure
        of the base or is a prefix of it (one per block). An array is a number,
        `(models,)`, or `(models, *shape)` with axes that broadcast over the leaf's.

    Returns:
      A tree like the base, in its dtypes.

    Example:
      >>> base = {"w": jnp.ones(2), "b": jnp.zeros(1)}
      >>> vectors = {"w": jnp.ones((3, 2)), "b": jnp.ones((3, 1))}
      >>> merged = merge(base, vectors, {"w": jnp.array([1.0, 2.0, 3.0]), "b": 0.5})
      >>> print(merged["w"], merged["b"])
      [7. 7.] [1.5]
    """
    full = jax.tree.broadcast(coefficients, base)

    def leaf(start, rows, coefficient):
        if rows is None:
            return start
        weights = jnp.asarray(coefficient, jnp.float32)
        wide = jnp.asarray(start, jnp.float32)
        if weights.ndim <= 1:
            weights = jnp.broadcast_to(weights, (len(rows),))
            change = jnp.tensordot(weights, rows.astype(jnp.float32), 1)
        else:
            change = jnp.sum(weights * rows.astype(jnp.float32), axis=0)
        return (wide + change).astype(jnp.asarray(start).dtype)

    return jax.tree.map(leaf, base, vectors, full, is_leaf=lambda x: x is None)
