"""Delta-guided fusion: checkpoints count where they changed."""

from typing import Literal

import jax
import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, Total, add_up, per_model, step


def delta_guided(
    granularity: Literal["element", "tensor"] = "element",
    rule: Literal["proportional", "inverse", "softmax"] = "proportional",
    *,
    temperature: float = 1.0,
) -> Merger:
    r"""Averages checkpoints with weights that grow with the size of their change.

    $$\theta = \theta_0 + \sum_k w_k \tau_k, \qquad w_k = \delta_k / \sum_j \delta_j$$

    where $\delta_k$ is $|\tau_k|$ for every element, or the norm of $\tau_k$ for every
    tensor; equal weights where nothing changed. Merge the checkpoints of each training
    run first and then the results, for fusion in levels.

    Args:
      granularity: what has a weight of its own.
      rule: `"proportional"` as above; `"inverse"`: to $1 / \delta_k$, what changed less
        counts more; `"softmax"` of $\delta_k$ over the temperature, in units of the
        largest.
      temperature: of the softmax, positive.

    Returns:
      The method.

    Raises:
      ValueError: if an argument is unknown or out of range.

    References:
      "CoDiEmb: A Collaborative yet Distinct Framework for Unified
      Representation Learning", 2025. Its code for fusion is not public: rule and
      granularity are readings of the text, of which the first are the default.
    """
    if granularity not in ("element", "tensor"):
        raise ValueError(
            f"`granularity` must be 'element' or 'tensor', got {granularity!r}."
        )
    if rule not in ("proportional", "inverse", "softmax"):
        raise ValueError(
            f"`rule` must be 'proportional', 'inverse' or 'softmax', got {rule!r}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature!r}.")

    def shares(sizes):
        """Weights over the first axis."""
        largest = jnp.max(sizes, axis=0, keepdims=True)
        sizes = sizes / jnp.where(largest > 0, largest, 1)
        if rule == "softmax":
            return jax.nn.softmax(sizes / temperature, axis=0)
        if rule == "inverse":
            # In the limit, one that did not change at all takes everything.
            sizes = 1 / jnp.maximum(sizes, jnp.finfo(jnp.float32).tiny ** 0.25)
        total = jnp.sum(sizes, axis=0, keepdims=True)
        equal = jnp.full_like(sizes, 1 / len(sizes))
        return jnp.where(total > 0, sizes / jnp.where(total > 0, total, 1), equal)

    def elementwise(leaf: Leaf):
        return add_up(shares(jnp.abs(leaf.vectors)) * leaf.vectors)

    if granularity == "element":
        return step(elementwise)

    def squares(leaf: Leaf):
        return jnp.sum(
            jnp.square(leaf.vectors), axis=tuple(range(1, leaf.vectors.ndim))
        )

    def whole(leaf: Leaf, total):
        weights = shares(jnp.sqrt(total))
        return add_up(per_model(weights, leaf.vectors) * leaf.vectors)

    return step(whole, Total(squares, lambda total, size: total), scope="tensor")
