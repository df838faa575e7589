"""Which task comes next: scheduled so that shares are exact, or drawn at random."""

from collections.abc import Mapping, Sequence

import numpy as np


def scheduled_task(
    weights: Mapping[str, float | int], credits: dict[str, float], active: Sequence[str]
) -> str:
    """Picks the task that is furthest behind its share.

    Args:
      weights: shares by task, of any sum.
      credits: what each task is behind by, in draws; updated in place.
      active: the tasks to choose from.

    Returns:
      The task.
    """
    total = sum(weights[task] for task in active)
    for task in active:
        credits[task] += weights[task] / total
    furthest = max(credits[task] for task in active)
    # The tolerance keeps rounding errors from deciding between equals, which would
    # break the exact blocks.
    chosen = next(task for task in active if credits[task] > furthest - 1e-9)
    credits[chosen] -= 1.0
    return chosen


def random_task(
    weights: Mapping[str, float | int], active: Sequence[str], *, seed: int, draw: int
) -> str:
    """Draws a task with probabilities in proportion to the weights.

    A function of its arguments alone: all processes draw the same task, and there is no
    state of a generator to save.

    Args:
      weights: shares by task, of any sum.
      active: the tasks to choose from.
      seed: of the stream of draws, at least 0.
      draw: place in the stream, at least 0.

    Returns:
      The task.

    Example:
      >>> shares = {"a": 0.75, "b": 0.25}
      >>> draws = [random_task(shares, "ab", seed=0, draw=i) for i in range(1000)]
      >>> 700 < draws.count("a") < 800
      True
    """
    edges = np.cumsum([weights[task] for task in active])
    level = np.random.default_rng([seed, draw]).random() * edges[-1]
    return active[int(np.searchsorted(edges, level, side="right"))]
