"""How much a model weighs its fields, on average over a data set."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mtjax.analysis.sown import mean_of_sown


def field_weights(
    model: Any, variables: Mapping[str, Any], batches: Iterable[Any]
) -> dict[str, Float[np.ndarray, "..."]]:
    """Measures the weights that `mtjax.nn.SENet` and its likes give to fields.

    Args:
      model: of which `model.apply(variables, batch)` is computed; some of its modules
        sow `"field_weights"` of the shape `(batch, ...)` in `"intermediates"`.
      variables: `{"params": ...}` and what else the model has.
      batches: of inputs; batches of one size compile once.

    Returns:
      Means over all examples, by path of the module.

    Raises:
      ValueError: if there is no batch, or nothing was sown.

    Example:
      >>> from mtjax.nn.senet import SENet
      >>> model, fields = SENet("double_sigmoid"), jnp.zeros((8, 3, 2))
      >>> variables = model.init(jax.random.key(0), fields)
      >>> field_weights(model, variables, [fields[:4], fields[4:]])
      {'': array([1., 1., 1.])}
    """

    def sums(sown):
        found = {}
        for path, weights in jax.tree_util.tree_leaves_with_path(sown):
            names = [jax.tree_util.keystr((key,), simple=True) for key in path]
            if "field_weights" in names:
                # A module that is called twice sows twice: the last one stays.
                found["/".join(names[: names.index("field_weights")])] = weights
        totals = {path: jnp.sum(w, axis=0) for path, w in found.items()}
        return totals, max(map(len, found.values()), default=0)

    means = mean_of_sown(model, variables, batches, sums)
    if not means:
        raise ValueError(
            "`batches` must hold an example and `model` must weigh fields, got none; "
            "`mtjax.nn.senet.SENet` sows what is read here."
        )
    return means
