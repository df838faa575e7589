"""KnOTS: merge in the basis that all task vectors share."""

import jax.numpy as jnp

from mtjax.merging.matrices import from_matrices, to_matrices
from mtjax.merging.merger import Leaf, Merger, chain, step


def knots(merger: Merger, *, out_axis: int = -1) -> Merger:
    r"""Runs a method in a common basis of the matrices' outputs.

    The task vectors of a matrix side by side, $[\tau_1 \dots \tau_T] = U S
    [V_1 \dots V_T]^\top$, have common left vectors $U$; the method merges
    $S V_t^\top$, and $U$ takes the result back. Parameters of fewer axes are merged as
    they are. Task arithmetic does not change; methods that look at single elements
    (`ties`, `dare`) find them better aligned.

    Args:
      merger: any method that acts on elements.
      out_axis: see `on_matrices`.

    Returns:
      The method. Singular values are computed anew in every pass over the model.

    References:
      Stoica et al., "Model Merging with SVD to Tie the Knots", ICLR, 2025.
    """

    def basis(leaf: Leaf):
        matrix = to_matrices(leaf.task_vectors, out_axis)
        side_by_side = jnp.concatenate(jnp.unstack(matrix), axis=1)
        full = matrix.shape[1] > side_by_side.shape[1]
        return jnp.linalg.svd(side_by_side, full_matrices=full)[0]

    def turn(leaf: Leaf):
        if leaf.base.ndim < 2:
            return leaf.vectors
        turned = basis(leaf).T[None] @ to_matrices(leaf.vectors, out_axis)
        return from_matrices(turned, leaf.base.shape, out_axis)

    def turn_back(leaf: Leaf):
        if leaf.base.ndim < 2:
            return leaf.vectors
        turned = basis(leaf)[None] @ to_matrices(leaf.vectors[None], out_axis)
        return from_matrices(turned, leaf.base.shape, out_axis)[0]

    return chain(
        step(turn, elementwise=False), merger, step(turn_back, elementwise=False)
    )
