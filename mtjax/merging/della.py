"""DELLA: drop small changes more often than large ones."""

import jax
import jax.numpy as jnp

from mtjax.merging.matrices import from_matrices, to_matrices
from mtjax.merging.merger import Leaf, Merger, chain, step
from mtjax.merging.task_arithmetic import scale as scaled
from mtjax.merging.ties import disjoint_mean, elect_sign


def della(
    drop_rate: float = 0.5,
    window: float = 0.2,
    scale: float = 1.0,
    *,
    out_axis: int = -1,
) -> Merger:
    r"""Drops elements at random by their rank, elects signs, averages what agrees.

    Args:
      drop_rate: see `magprune`.
      window: see `magprune`.
      scale: $\lambda$, factor of the merged vector; rescaling by `magprune` makes
        values above 1 rarely useful.
      out_axis: see `on_matrices`.

    Returns:
      The method; needs `key`.

    References:
      Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through
      Magnitude-Based Sampling", 2024.
    """
    pruned = magprune(drop_rate, window, out_axis=out_axis)
    return chain(pruned, elect_sign(), disjoint_mean(), scaled(scale))


def magprune(drop_rate: float, window: float, *, out_axis: int = -1) -> Merger:
    r"""Drops elements of task vectors at random, small ones more often.

    Of n elements that feed one output, that of rank r by magnitude (0: largest) is
    dropped with probability $p_r = p - \varepsilon/2 + \varepsilon r / n$ and otherwise
    multiplied by $1 / (1 - p_r)$. A parameter of one axis is one row. Ranks need a
    sort, which makes this the slowest method on CPUs.

    Args:
      drop_rate: $p$, mean probability.
      window: $\varepsilon$, between the largest and the smallest probability; 0 is
        `dare`. All probabilities must be in [0, 1).
      out_axis: see `on_matrices`.

    Returns:
      A step for `chain`; needs `key`.

    Raises:
      ValueError: if a probability would not be in [0, 1).
    """
    least, most = drop_rate - window / 2, drop_rate + window / 2
    if window < 0 or least < 0 or most >= 1:
        raise ValueError(
            "`drop_rate` - `window` / 2 must be at least 0 and `drop_rate` + `window` "
            f"/ 2 below 1, got {drop_rate!r} and {window!r}."
        )

    def apply(leaf: Leaf):
        vectors = leaf.vectors
        rows = vectors.reshape(len(vectors), 1, -1)
        if leaf.base.ndim > 1:
            rows = to_matrices(vectors, out_axis)
        order = jnp.argsort(-jnp.abs(rows), axis=-1)
        ranks = jnp.argsort(order, axis=-1)
        rates = least + window * ranks / rows.shape[-1]
        kept = jax.random.uniform(leaf.key, rows.shape) >= rates
        pruned = jnp.where(kept, rows / (1 - rates), 0)
        if leaf.base.ndim > 1:
            return from_matrices(pruned, leaf.base.shape, out_axis)
        return pruned.reshape(vectors.shape)

    return step(apply, needs_key=True, elementwise=False)
