"""Means over a data set of what the modules of a model sow."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

SOWN = "intermediates"


def mean_of_sown(
    model: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    sums: Callable[[Mapping[str, Any]], tuple[dict[Any, Any], Any]],
) -> dict[Any, np.ndarray]:
    """Runs a model over batches and averages over all their examples.

    Args:
      model: of which `model.apply(variables, batch)` is computed, without training.
      variables: `{"params": ...}` and what else the model has.
      batches: of inputs; batches of one size compile once.
      sums: from the collection `"intermediates"` of a batch to sums over its examples,
        by keys that can be compared, and the number of examples. It is traced.

    Returns:
      The sums over all batches divided by the number of examples, added in float64;
      empty if there is no batch or nothing was found.
    """
    variables = {k: v for k, v in variables.items() if k != SOWN}

    @jax.jit
    def of_batch(batch):
        _, state = model.apply(variables, batch, mutable=[SOWN])
        return sums(state.get(SOWN, {}))

    totals: dict[Any, Any] = {}
    count = 0
    for batch in batches:
        found, size = of_batch(batch)
        count += int(size)
        for key, x in found.items():
            totals[key] = totals.get(key, 0.0) + np.asarray(x, np.float64)
    return {key: x / count for key, x in totals.items()}
