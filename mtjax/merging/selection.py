"""How strongly to merge, chosen on validation data."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from mtjax.merging.compressed import apply_vector

Accuracy = Callable[[PyTree, str], float]
"""From parameters and a task to the accuracy on validation data."""

GRID = tuple(i / 20 for i in range(21))


class MergedModel(NamedTuple):
    r"""A merged model of selected strength.

    Attributes:
      params: a tree like the base.
      coefficient: the $\alpha$ that was selected.
      scores: normalised validation accuracy per coefficient.
    """

    params: PyTree
    coefficient: float
    scores: dict[float, float]


def select_coefficient(
    base: PyTree,
    vector: PyTree,
    accuracy: Accuracy,
    single: Mapping[str, float],
    coefficients: Sequence[float] = GRID,
) -> MergedModel:
    r"""Chooses $\alpha$ of $\theta_0 + \alpha \tau$ on validation data.

    $$\frac1T \sum_t a_t(\theta_0 + \alpha \tau) / a_t(\theta_t)$$

    Args:
      base: $\theta_0$.
      vector: $\tau$, of any `Merger.vector`.
      accuracy: of parameters at a task, on validation data.
      single: $a_t(\theta_t) > 0$ by task, on the same data.
      coefficients: to try; the first of equally good ones is taken.

    Returns:
      The model with the best mean normalised accuracy.

    Raises:
      ValueError: if there is nothing to choose from or a single accuracy is not
        positive.

    Example:
      >>> import jax.numpy as jnp
      >>> base, vector = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
      >>> near = lambda params, task: 1 - abs(params["w"][0] - 0.3)
      >>> select_coefficient(base, vector, near, {"a": 1.0}).coefficient
      0.3
    """
    if not coefficients:
        raise ValueError("`coefficients` must hold at least one number, got none.")
    if not single or min(single.values()) <= 0:
        raise ValueError(
            "`single` must hold one positive accuracy per task, got "
            f"{dict(single)}; leave out tasks that cannot be learned."
        )
    scores = {}
    for coefficient in coefficients:
        params = apply_vector(base, vector, coefficient)
        ratios = [float(accuracy(params, task)) / a for task, a in single.items()]
        scores[coefficient] = float(np.mean(ratios))
    best = max(scores, key=scores.__getitem__)
    return MergedModel(apply_vector(base, vector, best), best, scores)
