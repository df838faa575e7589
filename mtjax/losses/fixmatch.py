"""Pseudo-labels of one view of an input, learnt on another view."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Over = Literal["used", "batch"]


def fixmatch_loss(
    weak: Float[Array, "examples classes"],
    strong: Float[Array, "examples classes"],
    labels: Int[Array, " examples"] | None = None,
    *,
    threshold: float | None = 0.95,
    over: Over = "batch",
) -> Float[Array, ""]:
    r"""Cross-entropy of strong views with the labels that confident weak views give.

    .. math::
      \frac1n \sum_i 1[\max_c p_{ic} \ge \tau] \; CE(strong_i, \arg\max_c p_{ic}),
      \quad p_i = softmax(weak_i)

    Args:
      weak: logits of views that are changed little or not; no gradient goes through.
      strong: logits of strongly augmented views of the same inputs.
      labels: of examples whose label is taken as known, which count whatever the
        confidence; -1 for all others. None: none is known.
      threshold: :math:`\tau` in [0, 1], or None for the mean confidence of this batch,
        so that about half of it is used however sure the model is.
      over: whether :math:`n` is the size of the `"batch"`, as in FixMatch, or the
        number of examples that are `"used"`, as in aTLAS.

    Returns:
      The loss in nats, 0 if no example is used.

    Raises:
      ValueError: if the threshold or `over` is not one of these.

    Example:
      >>> weak = jnp.array([[4.0, 0.0], [0.1, 0.0]])
      >>> print(f"{fixmatch_loss(weak, jnp.zeros((2, 2)), over='used'):.4f}")
      0.6931

    References:
      FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence,
      NeurIPS 2020, equation 4; with known labels in the same batch: Knowledge
      Composition using Task Vectors with Learned Anisotropic Scaling, NeurIPS 2024.
      Labels are hard as in the former; the code of the latter trains on probabilities.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must be in [0, 1] or None, got {threshold!r}.")
    if over not in get_args(Over):
        raise ValueError(f"`over` must be one of {get_args(Over)}, got {over!r}.")
    p = jax.lax.stop_gradient(jax.nn.softmax(weak.astype(jnp.float32)))
    confidence, guesses = jnp.max(p, axis=-1), jnp.argmax(p, axis=-1)
    used = confidence >= (jnp.mean(confidence) if threshold is None else threshold)
    if labels is not None:
        used |= labels >= 0
        guesses = jnp.where(labels >= 0, labels, guesses)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        strong.astype(jnp.float32), guesses
    )
    number = len(losses) if over == "batch" else jnp.maximum(jnp.sum(used), 1)
    return jnp.sum(jnp.where(used, losses, 0.0)) / number
