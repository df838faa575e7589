"""A few labelled examples of every class."""

import numpy as np
from jaxtyping import Int


def few_shot_rows(
    labels: Int[np.ndarray, " examples"], shots: int, *, seed: int = 0
) -> Int[np.ndarray, " chosen"]:
    """Rows of so many examples per class, drawn without replacement.

    With the same seed fewer shots are a part of more shots, so that curves over the
    number of shots are smooth.

    Args:
      labels: of all examples, 0 to the number of classes less 1.
      shots: per class, at least 1; all of a class that has fewer.
      seed: of the draw.

    Returns:
      The rows, class after class.

    Raises:
      ValueError: if there is no shot or no example.

    Example:
      >>> few_shot_rows(np.array([1, 0, 1, 1, 0]), 2, seed=0).shape
      (4,)
    """
    if shots < 1 or not len(labels):
        raise ValueError(
            f"`shots` must be at least 1 and `labels` not empty, got {shots!r} and "
            f"{len(labels)} labels."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    sorted_labels = labels[order]
    rows = [order[sorted_labels == c][:shots] for c in range(labels.max() + 1)]
    return np.concatenate(rows)
