"""Labels that count only where another task is positive."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float


def labels_within(
    labels: Mapping[str, Float[Array, " batch"]], within: Mapping[str, str]
) -> dict[str, Float[Array, " batch"]]:
    """Takes labels out of a task's sample space.

    A conversion happens after a click. Counted on clicks alone, it is the post-click
    conversion rate; counted on all impressions, leave it out of `within`, it is the
    click-through conversion rate.

    Args:
      labels: 0, 1, or NaN where there is none, by task.
      within: the task whose positives make up the sample space, by task.

    Returns:
      Labels with NaN outside of the spaces, also where the other task has no label.

    Raises:
      ValueError: if `within` names a task that has no labels.

    Example:
      >>> labels = {"click": jnp.array([1.0, 0.0]), "buy": jnp.array([0.0, 0.0])}
      >>> print(labels_within(labels, {"buy": "click"})["buy"])
      [ 0. nan]

    References:
      Progressive Layered Extraction (PLE), RecSys 2020, section 4.3.
    """
    unknown = sorted({*within, *within.values()} - set(labels))
    if unknown:
        raise ValueError(
            f"`within` must name tasks of `labels`, {sorted(labels)}, got {unknown}."
        )
    space = lambda task: labels[within[task]] == 1
    return {
        task: jnp.where(space(task), y, jnp.nan) if task in within else y
        for task, y in labels.items()
    }
