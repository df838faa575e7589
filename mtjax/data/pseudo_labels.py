"""Pseudo-labels that are trusted from the start, and batches that mix them in."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Float, Int


def trusted_labels(
    logits: Float[Array | np.ndarray, "examples classes"], most: int = 100
) -> Int[np.ndarray, " examples"]:
    r"""Pseudo-labels of the examples that test-time adaptation trusts from the start.

    Of each class the :math:`\min(N / 10 C, most)` examples that are most confidently
    predicted as it.

    Args:
      logits: of the base, for all N unlabelled examples.
      most: per class.

    Returns:
      Labels, -1 for all others: what `mtjax.losses.fixmatch_loss` takes. A class that
      is predicted less often has fewer.
    """
    z = np.asarray(logits, np.float64)
    guesses, classes = z.argmax(-1), z.shape[1]
    # Not the confidence, which is 1 too often: the odds against the guess.
    odds = np.exp(z - z.max(-1, keepdims=True))
    odds[np.arange(len(z)), guesses] = 0.0
    doubt = odds.sum(-1)
    labels = np.full(len(z), -1, np.int32)
    number = min(len(z) // classes // 10, most)
    for c in range(classes):
        rows = np.flatnonzero(guesses == c)
        best = np.argsort(doubt[rows], kind="stable")[:number]
        labels[rows[best]] = c
    return labels


def two_streams(
    labels: Int[np.ndarray, " examples"], size: int, *, seed: int = 0
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Rows of batches that are half trusted examples and half others, without end.

    Args:
      labels: as from `trusted_labels`.
      size: of a batch, even.
      seed: of the draw, with replacement.

    Yields:
      Rows. If there are none of one kind all are of the other.
    """
    rng = np.random.default_rng(seed)
    kinds = [np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)]
    kinds = [rows for rows in kinds if len(rows)]
    while True:
        yield np.concatenate([rng.choice(r, size // len(kinds)) for r in kinds])
