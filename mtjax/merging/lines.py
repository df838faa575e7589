"""LiNeS: scale task vectors by depth."""

import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, Total, add_up, step


def lines(beta: float, alpha: float | None = None) -> Merger:
    r"""Scales a merged task vector linearly in the depth of its layers.

    The vector of block $\ell$ of $L$ is multiplied by
    $\alpha + \beta \, \ell / (L - 1)$. Shallow layers carry what was learnt before, and
    stay closer to the base.

    Args:
      beta: what the last block gets more than the first; tuned on validation data.
      alpha: factor of the first block (and of parameters outside of blocks). By default
        that of the paper, $\|\sum_t \tau_t\|_1 / (T \|\tau\|_1)$, where $\tau$ is the
        vector that is scaled: 1/T behind `task_arithmetic(1)`. For a single model the
        paper takes `1 - beta`.

    Returns:
      A step for `chain`, behind one that combines the models. Which block a parameter
      belongs to is told by `depth_of` when merging.

    Example:
      >>> from mtjax.merging import chain, task_arithmetic
      >>> merger = chain(task_arithmetic(1.0), lines(beta=0.8))
      >>> base = {"layer_0": jnp.zeros(1), "layer_1": jnp.zeros(1)}
      >>> models = 2 * [{"layer_0": jnp.ones(1), "layer_1": jnp.ones(1)}]
      >>> merged = merger(base, models)
      >>> print(f"{merged['layer_0'][0]:.1f} {merged['layer_1'][0]:.1f}")
      1.0 2.6

    References:
      Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances
      Model Merging", ICLR, 2025.
    """

    def sizes(leaf: Leaf):
        merged = jnp.sum(jnp.abs(leaf.vectors))
        return jnp.sum(jnp.abs(add_up(leaf.task_vectors))), merged

    def scaled(leaf: Leaf, first):
        return (first + beta * leaf.depth) * leaf.vectors

    if alpha is not None:
        return step(lambda leaf: scaled(leaf, alpha))

    def apply(leaf: Leaf, totals):
        together, merged = totals
        share = together / jnp.where(merged > 0, merged, 1)
        return scaled(leaf, share / len(leaf.task_vectors))

    return step(apply, Total(sizes, lambda total, size: total))
