"""How often each task is drawn from a mixture."""

from collections.abc import Mapping
from typing import Literal


def mixture_weights(
    sizes: Mapping[str, int],
    weights: Literal["proportional", "uniform"]
    | Mapping[str, float | int] = "proportional",
    *,
    exponent: float = 1.0,
    cap: int | None = None,
) -> dict[str, float]:
    r"""Returns the share of draws that each task gets.

    With sizes :math:`n_k`, cap :math:`C` and exponent :math:`\alpha`, the proportional
    rule is :math:`p_k \propto \min(n_k, C)^\alpha`. The exponent is the inverse of the
    temperature; 1 follows the sizes, 0 is uniform.

    Args:
      sizes: numbers of examples by task, each at least one.
      weights: ``"proportional"``, ``"uniform"``, or a weight of at least zero for
        every task of `sizes`; a task of weight zero is never drawn.
      exponent: of the proportional rule, in [0, inf).
      cap: the size from which on a task counts no larger, at least one.

    Returns:
      Shares that sum to one, in the sorted order of the names.

    Raises:
      ValueError: if an argument breaks its rule.

    Example:
      >>> mixture_weights({"large": 800, "small": 200})
      {'large': 0.8, 'small': 0.2}
      >>> mixture_weights({"large": 800, "small": 200}, exponent=0.0)
      {'large': 0.5, 'small': 0.5}

    References:
      - Exploring the limits of transfer learning with a unified text-to-text
        transformer, 2020, section 3.5.2: the cap and the temperature.
    """
    if not sizes or min(sizes.values()) < 1:
        raise ValueError(
            f"`sizes` must be at least one for every task, got {dict(sizes)}. Leave "
            "empty tasks out."
        )
    if not 0.0 <= exponent < float("inf"):
        raise ValueError(f"`exponent` must be in [0, inf), got {exponent}.")
    if cap is not None and cap < 1:
        raise ValueError(f"`cap` must be at least one or None, got {cap}.")
    names = sorted(sizes)
    if isinstance(weights, Mapping):
        given = _explicit(names, weights)
    elif weights == "uniform":
        given = dict.fromkeys(names, 1.0)
    elif weights == "proportional":
        capped = {name: min(sizes[name], cap or sizes[name]) for name in names}
        # Relative to the largest, so that no power overflows.
        largest = max(capped.values())
        given = {name: (capped[name] / largest) ** exponent for name in names}
    else:
        raise ValueError(
            "`weights` must be 'proportional', 'uniform' or a mapping of task to "
            f"weight, got {weights!r}."
        )
    total = sum(given.values())
    return {name: given[name] / total for name in names}


def _explicit(names: list[str], weights: Mapping[str, float | int]) -> dict[str, float]:
    if sorted(weights) != names:
        raise ValueError(
            f"`weights` must have the tasks {names}, got {sorted(weights)}. Use zero "
            "for a task that is not to be drawn."
        )
    values = {name: float(weights[name]) for name in names}
    if not all(0.0 <= v < float("inf") for v in values.values()) or not any(
        values.values()
    ):
        raise ValueError(
            f"`weights` must be finite, at least zero and not all zero, got {values}."
        )
    return values
