"""Softmax over many items that looks at a few of them: sampled, or those of the batch.

An item that is drawn often stands for fewer others: its logit is lowered by the
logarithm of how likely it was drawn (logQ correction). Vectors are taken as they are:
normalise them first where a temperature is used, so that logits are cosines.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

_LEAST = 1e-8


def log_frequencies(
    counts: Shaped[Array | np.ndarray, " items"],
) -> Float[Array, " items"]:
    r"""The logQ of items that are drawn as often as a log has them.

    .. math:: \log q_j = \log clip(c_j / \textstyle\sum_i c_i, 10^{-8}, 1)

    Args:
      counts: how often each item occurs in training, at least one of them positive.
        For rows 0 and 1 of a catalogue (padding, unknown) 0.

    Returns:
      Logarithms; what never occurs has that of 1e-8, not minus infinity.

    Example:
      >>> print(jnp.exp(log_frequencies(jnp.array([3, 1]))))
      [0.75 0.25]
    """
    counts = jnp.asarray(counts, jnp.float32)
    return jnp.log(jnp.clip(counts / jnp.sum(counts), _LEAST, 1.0))


def sampled_softmax_loss(
    queries: Float[Array, "pairs width"],
    positives: Float[Array, "pairs width"],
    negatives: Float[Array, "draws width"],
    log_q: Float[Array, " draws"],
    *,
    positive_ids: Int[Array, " pairs"] | None = None,
    negative_ids: Int[Array, " draws"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, ""]:
    r"""Cross-entropy of the right item, with sampled items in place of all others.

    .. math::
      -\frac1B \sum_b \log \frac{e^{s_b}}{e^{s_b} +
        \sum_{j:\, i_j \ne i_b} e^{s_{bj} - \log(n q_j)}}

    with :math:`s = \langle q, z \rangle / \tau` and n draws, which serve all queries.
    The denominator is an unbiased estimate of that of the full softmax, and the loss is
    the full softmax if every item is drawn once, with n q = 1.

    Args:
      queries: vectors.
      positives: the right item of every query; it is there anyway and not corrected.
      negatives: drawn items.
      log_q: logarithm of the probability, at each draw, of the item that was drawn;
        below that of 1e-8 taken as such. See `log_frequencies`, or the logarithm of
        `mtjax.data.negative_probabilities`.
      positive_ids: of the right items.
      negative_ids: of the drawn items: with both, a draw that is a query's right item
        (an accidental hit) does not count for this query. The estimate is unbiased only
        without hits.
      temperature: :math:`\tau > 0`; may be learned.

    Returns:
      The mean over queries, in nats.

    Raises:
      ValueError: if only one kind of ids is given, or `temperature` is a number that is
        not positive.

    Example:
      >>> one, log_q = jnp.ones((1, 1)), jnp.log(jnp.array([0.5, 0.5]))
      >>> loss = sampled_softmax_loss(one, one, jnp.ones((2, 1)), log_q)
      >>> print(f"{loss:.4f}")
      1.0986

    References:
      On Using Very Large Target Vocabulary for Neural Machine Translation, ACL 2015;
      Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic
      Language Model, 2008. TensorFlow's function of this name lowers the right item's
      logit too, which is not unbiased.
    """
    _check_temperature(temperature)
    if (positive_ids is None) != (negative_ids is None):
        raise ValueError(
            "`positive_ids` and `negative_ids` must be given together or not at all: "
            "an accidental hit is told from both."
        )
    own = jnp.sum(queries * positives, axis=-1) / temperature
    others = queries @ negatives.T / temperature
    others -= (_floored(log_q) + np.log(len(negatives)))[None]
    if positive_ids is None or negative_ids is None:
        counts = jnp.ones(others.shape, bool)
    else:
        counts = positive_ids[:, None] != negative_ids[None]
    return _loss(own, others, counts)


def in_batch_softmax_loss(
    queries: Float[Array, "pairs width"],
    items: Float[Array, "pairs width"],
    *,
    log_q: Float[Array, " pairs"] | None = None,
    item_ids: Int[Array, " pairs"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    correct_positive: bool = True,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Cross-entropy of the right item among the items of the batch.

    .. math::
      -\frac1B \sum_b \log \frac{e^{s_{bb} - \log q_b}}
        {e^{s_{bb} - \log q_b} + \sum_{j:\, i_j \ne i_b} e^{s_{bj} - \log q_j}}

    with :math:`s = \langle q, z \rangle / \tau`.

    Args:
      queries: vectors.
      items: the right item of every query.
      log_q: logarithm of how often the log has each of these items; below that of 1e-8
        taken as such. All the same if None: then popular items, which are often
        negatives, are pushed down.
      item_ids: with them, another occurrence of a query's right item in the batch (an
        accidental hit) does not count for this query.
      temperature: :math:`\tau > 0`; may be learned.
      correct_positive: False leaves the right item, which was not drawn, without
        correction: this is `sampled_softmax_loss` with the other items of the batch.
      axis_name: in `jax.shard_map` or `jax.pmap`, the axis over which the batch is
        split: items of all devices are negatives, and the loss is the mean over
        devices. Not needed under `jax.jit`, where the batch is one.

    Returns:
      The mean over queries, in nats.

    Raises:
      ValueError: if `temperature` is a number that is not positive, or the right item
        shall not be corrected and `log_q` is missing.

    Example:
      >>> queries = jnp.array([[2.0, 0.0], [0.0, 2.0]])
      >>> print(f"{in_batch_softmax_loss(queries, queries):.4f}")
      0.0181

    References:
      Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations,
      RecSys 2019, equations 3 to 5.
    """
    _check_temperature(temperature)
    if log_q is None and not correct_positive:
        raise ValueError(
            "`log_q` must be given where `correct_positive` is False, got None; "
            "without it nothing is corrected."
        )
    own = jnp.sum(queries * items, axis=-1) / temperature
    number = jnp.arange(len(items))
    columns = (items, log_q, item_ids, number)
    if axis_name is not None:
        columns = (*columns[:3], number + jax.lax.axis_index(axis_name) * len(items))
        number = columns[3]
        columns = jax.tree.map(
            lambda x: jax.lax.all_gather(x, axis_name, tiled=True), columns
        )
    candidates, log_q_of_all, ids, numbers = columns
    others = queries @ candidates.T / temperature
    if log_q is not None and log_q_of_all is not None:
        others -= _floored(log_q_of_all)[None]
        if correct_positive:
            own -= _floored(log_q)
        else:
            others -= np.log(max(len(candidates) - 1, 1))
    counts = number[:, None] != numbers[None]
    if item_ids is not None and ids is not None:
        counts &= item_ids[:, None] != ids[None]
    loss = _loss(own, others, counts)
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def _loss(own: Array, others: Array, counts: Array) -> Array:
    # A query without negatives has a loss of 0, and no gradient that is NaN.
    lowest = jnp.finfo(others.dtype).min
    others = jnp.where(counts, others, lowest)
    together = jnp.concatenate([own[:, None], others], axis=1)
    return jnp.mean(jax.nn.logsumexp(together, axis=1) - own)


def _floored(log_q: Array) -> Array:
    return jnp.maximum(log_q, np.log(_LEAST))


def _check_temperature(temperature: float | Array) -> None:
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
