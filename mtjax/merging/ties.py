"""TIES: trim, elect signs, merge what agrees."""

from typing import Literal

import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, Scope, Total, add_up, chain, step
from mtjax.merging.task_arithmetic import scale as scaled
from mtjax.merging.trim import trim


def ties(
    density: float = 0.2,
    scale: float = 1.0,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    scope: Scope = "model",
) -> Merger:
    r"""Trims task vectors, elects a sign per element, and merges what agrees with it.

    1. Trim: of every task vector the largest elements stay, others become 0.
    2. Elect: $\gamma = \mathrm{sign}(\sum_t \tau_t)$ for every element; where the sum
       is exactly 0, the sign that most elements of the model have.
    3. Merge: the mean (or the sum) of the elements with that sign.

    Args:
      density: fraction that is kept, in (0, 1].
      scale: $\lambda$, factor of the merged vector; 1 suits the mean, about 0.3 the
        sum.
      reduction: over the agreeing, non-zero elements: `"mean"` as published or `"sum"`,
        as in AdaMerging and TALL-masks.
      scope: whether the largest elements are those of the whole model, as published, or
        of every tensor, which needs two passes less.

    Returns:
      The method.

    Raises:
      ValueError: if an argument is out of range.

    References:
      Yadav et al., "TIES-Merging: Resolving Interference When Merging Models",
      NeurIPS, 2023.
    """
    reductions = {"mean": disjoint_mean, "sum": _sum}
    if reduction not in reductions:
        raise ValueError(f"`reduction` must be 'mean' or 'sum', got {reduction!r}.")
    return chain(
        trim(density, scope), elect_sign(), reductions[reduction](), scaled(scale)
    )


def elect_sign(tie: Literal["majority", "positive"] = "majority") -> Merger:
    """Zeroes the elements of task vectors whose sign differs from that of their sum.

    Args:
      tie: the sign of elements whose sum is exactly zero: the one that most elected
        signs of the model have (one more pass), or positive.

    Returns:
      A step for `chain`, behind which task vectors are still apart.

    Raises:
      ValueError: if `tie` is unknown.
    """
    if tie not in ("majority", "positive"):
        raise ValueError(f"`tie` must be 'majority' or 'positive', got {tie!r}.")

    def agreeing(leaf: Leaf, majority=1):
        signs = jnp.sign(add_up(leaf.vectors))
        signs = jnp.where(signs == 0, jnp.where(majority >= 0, 1, -1), signs)
        return jnp.where(leaf.vectors * signs[None] > 0, leaf.vectors, 0)

    def elected(leaf: Leaf):
        return jnp.sum(jnp.sign(add_up(leaf.vectors)).astype(jnp.int32))

    if tie == "positive":
        return step(agreeing)
    return step(agreeing, Total(elected, lambda total, size: total))


def disjoint_mean() -> Merger:
    """The mean over models of the elements that are not zero.

    Returns:
      A step for `chain`.
    """

    def apply(leaf: Leaf):
        number = add_up((leaf.vectors != 0).astype(jnp.float32))
        return add_up(leaf.vectors) / jnp.maximum(number, 1)

    return step(apply)


def _sum() -> Merger:
    return step(lambda leaf: add_up(leaf.vectors))
