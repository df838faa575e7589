"""Isotropic merging: every direction of the merged task vector counts the same."""

import jax.numpy as jnp

from mtjax.merging.matrices import on_matrices, one_by_one, orthogonalised, thin_svd
from mtjax.merging.merger import Merger, add_up, chain
from mtjax.merging.task_arithmetic import scale as scaled


def iso_c(scale: float = 1.0, *, out_axis: int = -1) -> Merger:
    r"""Makes the spectrum of the summed task vectors flat.

    $\sum_t \tau_t = U S V^\top$ becomes $\bar s \, U V^\top$ with the mean singular
    value $\bar s$. Parameters that are no matrices are averaged.

    Args:
      scale: $\alpha$, factor of the merged vector, 1 to 1.5.
      out_axis: see `on_matrices`.

    Returns:
      The method.

    References:
      Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and
      Task-Specific Subspaces", ICML, 2025.
    """

    def merge(vectors):
        u, s, v = thin_svd(add_up(vectors))
        return jnp.mean(s) * (u @ v)

    return chain(on_matrices(merge, out_axis), scaled(scale))


def iso_cts(scale: float = 1.0, common: float = 0.8, *, out_axis: int = -1) -> Merger:
    r"""Iso-C that reserves directions for what single tasks alone need.

    The common space is spanned by the first singular vectors of $\sum_t \tau_t$. What
    is left of the rank is shared out equally: every task adds the leading singular
    triplets of its residual $(I - U_c U_c^\top) \tau_t$. All vectors together are made
    orthogonal and get the mean of their singular values.

    Args:
      scale: $\alpha$, factor of the merged vector.
      common: fraction of the rank that is common, in (0, 1]; what does not divide by
        the number of models is common too.
      out_axis: see `on_matrices`.

    Returns:
      The method.

    Raises:
      ValueError: if `common` is not in (0, 1].

    References:
      As `iso_c`.
    """
    if not 0 < common <= 1:
        raise ValueError(f"`common` must be in (0, 1], got {common!r}.")

    def merge(vectors):
        rank = min(vectors.shape[1:])
        own = int(rank * (1 - common)) // len(vectors)
        shared = rank - own * len(vectors)
        u, s, v = (x[..., :shared] for x in _triplets(add_up(vectors)))
        residuals = vectors - (u @ u.T)[None] @ vectors
        us, ss, vs = one_by_one(_triplets, residuals)
        left = jnp.concatenate([*jnp.unstack(us[..., :own]), u], axis=1)
        right = jnp.concatenate([*jnp.unstack(vs[..., :own]), v], axis=1)
        strength = jnp.concatenate([ss[:, :own].ravel(), s])
        return jnp.mean(strength) * (orthogonalised(left) @ orthogonalised(right).T)

    return chain(on_matrices(merge, out_axis), scaled(scale))


def _triplets(matrix):
    """Left vectors, values and right vectors, the vectors as columns."""
    u, s, v = thin_svd(matrix)
    return u, s, v.T
