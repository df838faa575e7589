"""PCB-Merging: parameters compete, within a task and between tasks."""

import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, add_up, chain, per_model, step
from mtjax.merging.order_statistics import threshold
from mtjax.merging.task_arithmetic import scale as scaled

_TAIL = 1e-4  # magnitudes are clamped at this fraction of both tails


_ROUNDING = 1e-6  # of a share


def pcb(density: float = 0.1, scale: float = 1.2) -> Merger:
    r"""Weighs elements of task vectors by their importance to their and other tasks.

    With $c = |\tau|$, clamped at its 0.01 % tails and scaled to [0, 1] over the model,

    $$s_t = \exp(T c_t^2) \odot \tanh\Bigl(\tau_t \odot \sum_u \tau_u\Bigr)$$

    Scores below those of the highest fraction are raised to the lowest of it, and all
    are scaled to [0, 1]; $\tau = \sum_t s_t \tau_t / \sum_t s_t$.

    Args:
      density: fraction of elements whose scores stay apart, in (0, 1].
      scale: $\lambda$, factor of the merged vector.

    Returns:
      The method; reads the model eight times before merging (exact quantiles).

    Raises:
      ValueError: if the density is not in (0, 1].

    References:
      Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS, 2024.
    """
    if not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density!r}.")

    def score(leaf: Leaf, *known):
        sizes = jnp.abs(leaf.vectors)
        low, high = (per_model(known[i], sizes) for i in (1, 3))
        inside = _to_unit(jnp.clip(sizes, low, high), low, high)
        shared = jnp.tanh(leaf.vectors * add_up(leaf.vectors)[None])
        return jnp.exp(len(sizes) * jnp.square(inside)) * shared

    def apply(leaf: Leaf, *known):
        low, high = (per_model(known[i], leaf.vectors) for i in (5, 7))
        shares = _to_unit(jnp.maximum(score(leaf, *known), low), low, high)
        # A score at the threshold, computed twice, may be off it by rounding: without
        # the limit its vector would count in full and not at all.
        total = add_up(shares)
        merged = add_up(shares * leaf.vectors) / jnp.maximum(total, _ROUNDING)
        return jnp.where(total > _ROUNDING, merged, 0)

    bounds = [threshold(_size, fraction) for fraction in (1 - _TAIL, _TAIL)]
    scores = [threshold(score, fraction) for fraction in (density, 0.0)]
    totals = [total for pair in (*bounds, *scores) for total in pair]
    return chain(step(apply, *totals), scaled(scale))


def _size(leaf: Leaf, *_):
    return jnp.abs(leaf.vectors)


def _to_unit(values, low, high):
    span = high - low
    return (values - low) / jnp.where(span > 0, span, 1)
