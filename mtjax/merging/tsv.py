"""Task singular vectors: low-rank task vectors whose directions are set apart."""

import jax.numpy as jnp

from mtjax.merging.matrices import on_matrices, one_by_one, orthogonalised, thin_svd
from mtjax.merging.merger import Merger, chain
from mtjax.merging.task_arithmetic import scale as scaled


def tsv_m(scale: float = 1.0, *, out_axis: int = -1) -> Merger:
    r"""Merges the leading singular vectors of all tasks after making them orthogonal.

    Of every matrix $\tau_t = U_t S_t V_t^\top$ the first r/T singular triplets stay
    (r: rank of a full matrix, T models, at least one triplet). The kept vectors of all
    tasks side by side, $U$ and $V$, are replaced by the nearest matrices with
    orthonormal columns: $\tau = U_\perp S V_\perp^\top$. Other parameters are averaged.

    Args:
      scale: $\alpha$, factor of the merged vector.
      out_axis: see `on_matrices`.

    Returns:
      The method.

    References:
      Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model
      Merging", CVPR, 2025.
    """

    def merge(vectors):
        rank = min(vectors.shape[1:])
        kept = max(1, rank // len(vectors))
        u, s, v = one_by_one(thin_svd, vectors)
        left = jnp.concatenate(jnp.unstack(u[:, :, :kept]), axis=1)
        right = jnp.concatenate(jnp.unstack(v[:, :kept]), axis=0)
        strength = s[:, :kept].ravel()
        return (orthogonalised(left) * strength[None]) @ orthogonalised(right)

    return chain(on_matrices(merge, out_axis), scaled(scale))
