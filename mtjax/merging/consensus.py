"""Consensus: leave out of a merged vector what too few tasks want."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.merging.merger import Leaf, Merger, add_up, chain, step
from mtjax.merging.task_arithmetic import scale as scaled


def consensus(
    threshold: float = 0.4, min_agreement: int = 2, scale: float = 1.0
) -> Merger:
    r"""Keeps the elements of a merged vector that several tasks want.

    $$
    s \, 1\Big[ \sum_t 1[\, |\tau_t| > \lambda |\tau - \tau_t| \,] \ge k \Big] \, \tau
    $$

    No data are needed with one threshold for all tasks.
    `mtjax.systems.tall_masks.consensus_merging` chooses one per task, and the factor,
    on validation data.

    Args:
      threshold: $\lambda \ge 0$.
      min_agreement: $k \ge 0$: 1 drops what no task wants, 2 also what a single one
        wants.
      scale: $s$, factor of the result.

    Returns:
      A step for `chain`, behind one that combines the models into $\tau$ without a
      factor. By itself the method takes the sum of the task vectors.

    Raises:
      ValueError: if a number is negative.

    Example:
      >>> base = {"w": jnp.zeros(3)}
      >>> rows = jnp.array([[1.0, 2.0, 0.0], [0.0, 2.0, 3.0]])
      >>> models = [{"w": row} for row in rows]
      >>> print(consensus()(base, models)["w"])
      [0. 4. 0.]

    References:
      Wang et al., "Localizing Task Information for Improved Model Merging and
      Compression", ICML, 2024.
    """
    if threshold < 0 or min_agreement < 0:
        raise ValueError(
            "`threshold` and `min_agreement` must not be negative, got "
            f"{threshold!r} and {min_agreement!r}."
        )

    def apply(leaf: Leaf):
        apart = leaf.vectors.ndim > leaf.base.ndim
        merged = add_up(leaf.vectors) if apart else leaf.vectors
        votes = wanted(leaf.task_vectors, merged[None], threshold)
        return jnp.where(add_up(votes.astype(jnp.int32)) >= min_agreement, merged, 0)

    return chain(step(apply), scaled(scale))


def wanted(
    vector: Float[Array, "..."],
    merged: Float[Array, "..."],
    threshold: float | Float[Array, ""],
) -> Bool[Array, "..."]:
    r"""Where a merged vector is nearer to a task's own than zero is.

    Args:
      vector: $\tau_t$, of one task or of several.
      merged: $\tau$, which broadcasts against it.
      threshold: $\lambda$.

    Returns:
      $|\tau_t| > \lambda |\tau - \tau_t|$, strictly.
    """
    return jnp.abs(vector) > threshold * jnp.abs(merged - vector)
