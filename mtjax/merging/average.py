"""Averages of models."""

from collections.abc import Sequence

import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, combined, step
from mtjax.merging.task_arithmetic import check_one_each


def average(weights: Sequence[float | int] | None = None) -> Merger:
    r"""The weighted average of all models; needs no base.

    $$\theta = \sum_t w_t \theta_t \big/ \sum_t w_t$$

    Equal weights on fine-tunings of one task are a uniform model soup.

    Args:
      weights: one per model, in the order of the models (names sorted), with a sum that
        is not zero; equal by default.

    Returns:
      The method; also a step for `chain`.

    Raises:
      ValueError: if the weights add up to zero.

    References:
      Wortsman et al., "Model Soups", ICML, 2022.
    """
    given = None if weights is None else jnp.asarray(weights, jnp.float32)
    if given is not None and (given.ndim != 1 or jnp.sum(given) == 0):
        raise ValueError(
            f"`weights` must be one number per model with a sum that is not zero, got "
            f"{weights!r}."
        )

    def apply(leaf: Leaf):
        shares = jnp.ones(len(leaf.vectors)) if given is None else given
        check_one_each("weights", shares, leaf)
        return combined(shares / jnp.sum(shares), leaf.vectors)

    return step(apply, needs_base=False)
