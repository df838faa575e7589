"""What goes wrong with experts: they die, fall to one task, or leave a task alone."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class ExpertFailures(NamedTuple):
    """Which experts and tasks fail, by their numbers.

    Attributes:
      collapsed: experts that say nothing but zero, or that hold all gates alone.
      degraded: shared experts that a single task uses.
      underfitted: tasks that have experts of their own and hardly use them.
    """

    collapsed: tuple[int, ...]
    degraded: tuple[int, ...]
    underfitted: tuple[int, ...]


def expert_failures(
    weights: Float[np.ndarray, "tasks experts"],
    zero_rate: Float[np.ndarray, " experts"],
    own: Bool[np.ndarray, "tasks experts"],
    *,
    zero_limit: float = 0.9,
    alone: float = 0.95,
    used: float = 0.5,
    neglected: float = 0.05,
) -> ExpertFailures:
    """Finds collapse, degradation and underfitting in what experts do on a data set.

    Args:
      weights: mean weight of every expert in every task's gate; rows sum to 1. From
        `expert_utilisation`, as is the next.
      zero_rate: share of every expert's outputs that are 0, in [0, 1].
      own: whether an expert belongs to the task alone; an expert of no task is shared.
      zero_limit: an expert with a higher zero rate has collapsed.
      alone: so has a choice of experts where one has more than this share of the mass
        of all gates.
      used: a task uses an expert that has more than this share of its gate.
      neglected: a task whose own experts together have less than this underfits.

    Returns:
      The failures.

    Raises:
      ValueError: if the three arrays are not of one number of experts.

    Example:
      >>> weights = np.array([[0.6, 0.4, 0.0], [0.02, 0.0, 0.98]])
      >>> own = np.array([[False, True, False], [False, False, True]])
      >>> expert_failures(weights, np.array([0.1, 0.95, 0.0]), own)
      ExpertFailures(collapsed=(1,), degraded=(0,), underfitted=())

    References:
      HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou, KDD
      2025: expert collapse, degradation and underfitting. The paper shows them; the
      limits are ours.
    """
    if weights.shape != own.shape or weights.shape[1:] != zero_rate.shape:
        raise ValueError(
            "`weights`, `zero_rate` and `own` must be of the same tasks and experts, "
            f"got {weights.shape}, {zero_rate.shape} and {own.shape}."
        )
    numbers = lambda found: tuple(np.flatnonzero(found).tolist())
    held = weights.mean(axis=0) > alone
    shared = ~own.any(axis=0)
    mass = np.where(own, weights, 0.0).sum(axis=1)
    return ExpertFailures(
        numbers((zero_rate > zero_limit) | held),
        numbers(shared & ((weights > used).sum(axis=0) == 1)),
        numbers(own.any(axis=1) & (mass < neglected)),
    )
