"""The log of ranking_throughput.py, the same for all libraries."""

import numpy as np

FIELDS, NUMBERS, TASKS = 31, 7, ("income", "married")


def drawn(rows: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values `(rows, 31)`, numbers `(rows, 7)` and labels `(rows, 2)`."""
    rng = np.random.default_rng(0)
    values = rng.integers(vocabulary, size=(rows, FIELDS)).astype(np.int32)
    numbers = rng.normal(size=(rows, NUMBERS)).astype(np.float32)
    labels = (numbers[:, :2] > rng.normal(size=(rows, 2))).astype(np.float32)
    return values, numbers, labels
