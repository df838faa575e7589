"""Metrics of full rankings of items: the rank of the right one, recall, MRR, NDCG."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Int, Real


def full_ranks(
    scores: Real[np.ndarray, "n items"],
    targets: Int[np.ndarray, " targets"],
    *,
    excluded: Bool[np.ndarray, "n items"] | Bool[np.ndarray, " items"] | None = None,
) -> Float[np.ndarray, " n"]:
    """Ranks the target among all items; 1 is the best.

    There are no sampled negatives, whose metrics can order models wrongly. Items with
    equal scores share the mean of their ranks, so that a model that scores all items
    alike gets the rank of chance and not the first.

    Args:
      scores: of every item.
      targets: the column of the right item.
      excluded: items that are not ranked, such as padding or what the user has seen;
        the target itself is always ranked.

    Returns:
      The rank of every target, a multiple of one half.

    Raises:
      ValueError: if lengths differ, a target is no column or its score is NaN.

    Example:
      >>> full_ranks(np.array([[0.1, 0.7, 0.7], [0.3, 0.2, 0.1]]), np.array([1, 2]))
      array([1.5, 3. ])

    References:
      On Sampled Metrics for Item Recommendation, 2020.
    """
    if len(targets) != len(scores):
        raise ValueError(
            f"`targets` must have an entry per row of `scores`, got {len(targets)} and "
            f"{len(scores)}."
        )
    _check_columns(targets, scores.shape[1])
    own = scores[np.arange(len(targets)), targets]
    masks = None if excluded is None else [np.broadcast_to(excluded, scores.shape)]
    return full_ranks_in_blocks([scores], targets, own, excluded=masks)


def full_ranks_in_blocks(
    blocks: Iterable[Real[np.ndarray, "n _"]],
    targets: Int[np.ndarray, " n"],
    target_scores: Real[np.ndarray, " n"],
    *,
    excluded: Iterable[Bool[np.ndarray, "..."]] | None = None,
) -> Float[np.ndarray, " n"]:
    """Ranks the targets where the scores of all items do not fit in memory.

    Args:
      blocks: the scores of consecutive items; may be made lazily.
      targets: the number of the right item, counted over all blocks.
      target_scores: the scores of the targets.
      excluded: a mask per block, as in :func:`full_ranks`.

    Returns:
      What :func:`full_ranks` returns for the blocks side by side.

    Raises:
      ValueError: if a target is beyond the last block or its score is NaN.

    Example:
      >>> blocks = [np.array([[0.1, 0.7]]), np.array([[0.7]])]
      >>> full_ranks_in_blocks(blocks, np.array([2]), np.array([0.7]))
      array([1.5])
    """
    if np.isnan(target_scores).any():
        raise ValueError(
            "`target_scores` must not be NaN, got "
            f"{int(np.isnan(target_scores).sum())} such rows."
        )
    own = target_scores[:, None]
    better = np.zeros(len(targets), np.int64)
    equal = np.zeros(len(targets), np.int64)
    masks = iter(excluded) if excluded is not None else None
    start = 0
    for block in blocks:
        ranked = np.ones(block.shape, bool)
        if masks is not None:
            ranked &= ~next(masks)
        here = targets - start
        inside = np.flatnonzero((here >= 0) & (here < block.shape[1]))
        # The target is counted once, as the 1 below.
        ranked[inside, here[inside]] = False
        # The score of an item that is NaN is neither better nor equal.
        better += ((block > own) & ranked).sum(axis=1)
        equal += ((block == own) & ranked).sum(axis=1)
        start += block.shape[1]
    _check_columns(targets, start)
    return 1.0 + better + 0.5 * equal


def top_k_metrics(
    ranks: Float[np.ndarray, " n"], ks: Iterable[int] = (5, 10, 20)
) -> dict[str, float]:
    r"""Recall, MRR and NDCG of the first `k` items, for one right item per row.

    With rank :math:`r`: recall counts :math:`r \le k`, MRR averages :math:`1/r` and
    NDCG :math:`1/\log_2(1 + r)` over them, all zero where :math:`r > k`.

    Args:
      ranks: from :func:`full_ranks`; ties have half ranks.
      ks: lengths of the list.

    Returns:
      ``{"recall@5": ..., "mrr@5": ..., "ndcg@5": ..., ...}``; NaN without rows.

    Raises:
      ValueError: if a `k` is below 1 or a rank below 1.

    Example:
      >>> top_k_metrics(np.array([1.0, 3.0, 9.0]), ks=[5])
      {'recall@5': 0.666..., 'mrr@5': 0.444..., 'ndcg@5': 0.5}
    """
    ks = list(ks)
    if any(k < 1 for k in ks):
        raise ValueError(f"`ks` must be at least 1, got {ks}.")
    if (ranks < 1.0).any():
        raise ValueError(f"`ranks` must be at least 1, got {ranks.min()}.")
    if not len(ranks):
        return {f"{m}@{k}": np.nan for k in ks for m in ("recall", "mrr", "ndcg")}
    results = {}
    for k in ks:
        hit = ranks <= k
        results[f"recall@{k}"] = float(np.mean(hit))
        results[f"mrr@{k}"] = float(np.mean(hit / ranks))
        results[f"ndcg@{k}"] = float(np.mean(hit / np.log2(1.0 + ranks)))
    return results


def _check_columns(targets: Int[np.ndarray, " n"], columns: int) -> None:
    if len(targets) and (targets.min() < 0 or targets.max() >= columns):
        raise ValueError(
            f"`targets` must be columns of the scores, 0 to {columns - 1}, got "
            f"{targets.min()} to {targets.max()}."
        )
