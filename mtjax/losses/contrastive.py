"""Contrastive losses: of similarities that are at hand, and of embedded pairs."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mtjax.losses.unit_vectors import unit_vectors

PositiveReduction = Literal["mean", "sum_inside_log"]


def contrastive_loss(
    positives: Float[Array, "anchors positives"],
    negatives: Float[Array, "anchors negatives"],
    *,
    mask: Bool[Array, "anchors negatives"] | None = None,
    temperature: float = 0.1,
    positive_reduction: PositiveReduction = "mean",
    include_positive_in_denominator: bool = True,
) -> Float[Array, ""]:
    r"""Pulls anchors to their positives and away from their negatives (InfoNCE).

    .. math::
      \frac1B \sum_b \frac1P \sum_p -\log
        \frac{e^{s_{bp} / \tau}}{[e^{s_{bp} / \tau}] + \sum_k e^{n_{bk} / \tau}}

    with similarities :math:`s` to the positives and :math:`n` to the negatives; the
    term in brackets can be left out.

    Args:
      positives: similarities of each anchor to its positives, at least one.
      negatives: similarities of each anchor to its negatives.
      mask: True where a negative counts; all if None. Every anchor needs at least one.
      temperature: :math:`\tau > 0`.
      positive_reduction: ``"mean"`` over positives outside the logarithm, as above, or
        ``"sum_inside_log"``: the exponentials of all positives are added up in
        numerator and denominator.
      include_positive_in_denominator: whether the bracket is there. Without it the
        loss can be negative.

    Returns:
      The mean over anchors, in nats.

    Raises:
      ValueError: if `temperature` is not positive or `positive_reduction` unknown.

    Example:
      >>> s, n = jnp.array([[1.0]]), jnp.array([[1.0, 1.0]])
      >>> print(f"{contrastive_loss(s, n):.4f}")
      1.0986

    References:
      Representation Learning with Contrastive Predictive Coding, 2018, equation 4;
      Supervised Contrastive Learning, 2020, equations 2 and 3, for several positives.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    if positive_reduction not in get_args(PositiveReduction):
        raise ValueError(
            f"`positive_reduction` must be one of {get_args(PositiveReduction)}, got "
            f"{positive_reduction!r}."
        )
    attraction = positives / temperature
    if positive_reduction == "sum_inside_log":
        attraction = jax.nn.logsumexp(attraction, axis=1, keepdims=True)
    repulsion = jax.nn.logsumexp(
        negatives / temperature, axis=1, keepdims=True, where=mask
    )
    if include_positive_in_denominator:
        repulsion = jnp.logaddexp(attraction, repulsion)
    return jnp.mean(repulsion - attraction)


def in_batch_contrastive_loss(
    queries: Float[Array, "pairs width"],
    positives: Float[Array, "pairs width"],
    negatives: Float[Array, "negatives width"] | None = None,
    *,
    mask: Bool[Array | np.ndarray, "pairs candidates"] | None = None,
    temperature: float = 0.05,
) -> Float[Array, ""]:
    r"""InfoNCE of embedded pairs, with hard negatives and those of the batch.

    .. math::
      -\frac1B \sum_b \log \frac{e^{\cos(q_b, d_b) / \tau}}
        {e^{\cos(q_b, d_b) / \tau} + \sum_{c \ne b} e^{\cos(q_b, d_c) / \tau}}

    Candidates :math:`d` are the positives of all queries, then the hard negatives of
    all queries: each of them serves every query.

    Args:
      queries: embeddings, of any length above zero.
      positives: the one that belongs to every query.
      negatives: hard negatives, any number per query, in any order.
      mask: True where a candidate counts as a negative of the query; all do if None. A
        query's own positive never does. Mask those that answer the query too; at least
        one negative must be left to every query.
      temperature: :math:`\tau > 0`.

    Returns:
      The mean over queries, in nats.

    Raises:
      ValueError: if `temperature` is not positive.

    Example:
      >>> queries = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(f"{in_batch_contrastive_loss(queries, queries, temperature=1.0):.4f}")
      0.3133

    References:
      Representation Learning with Contrastive Predictive Coding, 2018, equation 4;
      Dense Passage Retrieval for Open-Domain Question Answering, 2020, section 3.2.
    """
    others = [] if negatives is None else [negatives]
    candidates = jnp.concatenate([positives, *others])
    similar = unit_vectors(queries) @ unit_vectors(candidates).T
    counts = ~jnp.eye(*similar.shape, dtype=bool)
    if mask is not None:
        counts = counts & mask
    own = jnp.diagonal(similar)[:, None]
    return contrastive_loss(own, similar, mask=counts, temperature=temperature)
