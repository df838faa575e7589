"""Labels that are not final yet: conversions come days after a click."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float


def mature_labels(
    labels: Mapping[str, Float[Array, " batch"]],
    age: Float[Array, " batch"],
    windows: Mapping[str, float],
) -> dict[str, Float[Array, " batch"]]:
    r"""Takes the labels of young examples out of the tasks that are still open.

    A missing conversion is no negative before its time is over. Known positives of the
    same age go as well: kept alone, they would make conversions look too frequent.

    .. math:: y_{ti} \to NaN \quad \text{where } age_i < window_t

    Args:
      labels: 0, 1, or NaN where there is none, by task.
      age: time since the impression, in any unit.
      windows: the time after which a task's labels are final, in the same unit, not
        negative; tasks that are not named are final at once.

    Returns:
      Labels by task for `mtjax.losses.binary_losses`, which leaves NaN out.

    Raises:
      ValueError: if `windows` names an unknown task or holds a negative time.

    Example:
      >>> labels = {"click": jnp.array([1.0, 1.0]), "buy": jnp.array([0.0, 0.0])}
      >>> print(mature_labels(labels, jnp.array([1.0, 30.0]), {"buy": 7.0})["buy"])
      [nan  0.]
    """
    unknown = sorted(set(windows) - set(labels))
    if unknown:
        raise ValueError(
            f"`windows` must name tasks of `labels`, {sorted(labels)}, got {unknown}."
        )
    negative = {task: window for task, window in windows.items() if not window >= 0}
    if negative:
        raise ValueError(f"`windows` must not be negative, got {negative}.")
    return {
        task: jnp.where(age < windows[task], jnp.nan, y) if task in windows else y
        for task, y in labels.items()
    }
