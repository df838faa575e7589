"""Negative items for training losses; evaluation ranks all items instead."""

import numpy as np
from jaxtyping import Float, Int, Int32


def sample_negatives(
    positives: Int[np.ndarray, " n"],
    train_counts: Int[np.ndarray, " items"],
    number: int,
    *,
    strategy: str = "uniform",
    power: float = 0.75,
    seed: int,
) -> Int32[np.ndarray, "n number"]:
    """Draws items of training that are not the positive of their row.

    Args:
      positives: id of the right item of every row.
      train_counts: how often each item is a target in training, as in
        :attr:`mtjax.data.Catalogue.train_counts`; only items that are can be drawn.
      number: negatives per row, at least 1.
      strategy: ``"uniform"`` or ``"popularity"``, see
        :func:`negative_probabilities`.
      power: exponent of the counts for ``"popularity"``.
      seed: decides the draws.

    Returns:
      Ids, drawn independently, so that a row may hold one twice.

    Raises:
      ValueError: if an argument is out of range or training has less than two items.

    Example:
      >>> counts = np.array([0, 0, 5, 1])
      >>> sample_negatives(np.array([2, 3]), counts, 2, seed=0).tolist()
      [[3, 3], [2, 2]]
    """
    if number < 1:
        raise ValueError(f"`number` must be at least 1, got {number}.")
    chances = negative_probabilities(train_counts, strategy=strategy, power=power)
    if np.count_nonzero(chances) < 2:
        raise ValueError(
            "`train_counts` must have at least two items that occur, got "
            f"{np.count_nonzero(chances)}."
        )
    generator = np.random.default_rng(seed)
    drawn = generator.choice(len(chances), (len(positives), number), p=chances)
    while (hits := drawn == positives[:, None]).any():
        drawn[hits] = generator.choice(len(chances), int(hits.sum()), p=chances)
    return drawn.astype(np.int32)


def negative_probabilities(
    train_counts: Int[np.ndarray, " items"],
    *,
    strategy: str = "uniform",
    power: float = 0.75,
) -> Float[np.ndarray, " items"]:
    r"""Returns how likely each item is drawn: what a logQ correction needs.

    Uniform over the items of training, or :math:`p_j \propto c_j^{\mathrm{power}}`.

    Args:
      train_counts: how often each item is a target in training.
      strategy: ``"uniform"`` or ``"popularity"``.
      power: exponent, 0 is uniform and 1 the frequencies of training.

    Returns:
      Probabilities, 0 for items that training lacks.

    Raises:
      ValueError: if `strategy` is unknown, `power` negative or no item occurs.

    Example:
      >>> negative_probabilities(np.array([0, 3, 1]), strategy="popularity", power=1.0)
      array([0.  , 0.75, 0.25])
    """
    if strategy not in ("uniform", "popularity"):
        raise ValueError(
            f"`strategy` must be 'uniform' or 'popularity', got {strategy!r}."
        )
    if power < 0.0 or not (train_counts > 0).any():
        raise ValueError(
            "`power` must not be negative and `train_counts` must have an item that "
            f"occurs, got {power} and {int((train_counts > 0).sum())} items."
        )
    exponent = power if strategy == "popularity" else 0.0
    weights = np.where(train_counts > 0, train_counts.astype(np.float64), 1.0)
    weights = weights**exponent * (train_counts > 0)
    return weights / weights.sum()
