"""Which patterns of fields each task picks, and which fields these have read."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mtjax.analysis.sown import mean_of_sown


class PatternSelection(NamedTuple):
    """What tasks pick, on average over examples.

    Attributes:
      weights: of every pattern, those of the first block first.
      fields: how much of a task's choice goes to every field, by block: the weights of
        the block's patterns times their attention. In later blocks an entry is what
        its field has become. All of a task sum to 1.
      apart: total variation between two tasks' weights, in [0, 1], which is taken
        example by example.
    """

    weights: Float[np.ndarray, "tasks patterns"]
    fields: Float[np.ndarray, "blocks tasks fields"]
    apart: Float[np.ndarray, "tasks tasks"]


def pattern_selection(
    model: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any]
) -> PatternSelection:
    """Tells which patterns, and through them which fields, each task uses.

    Args:
      model: of which `model.apply(variables, batch)` is computed, without training;
        `mtjax.systems.apem.APEM`, or with it inside, in blocks that read fields.
      variables: `{"params": ...}` and what else the model has.
      batches: of inputs; batches of one size compile once.

    Returns:
      Means over all examples.

    Raises:
      ValueError: if there is no batch, or the model has no such blocks.

    Example:
      >>> from mtjax.systems.apem import APEM, APEMConfig
      >>> model, fields = APEM(("buy", "keep"), APEMConfig(2)), jnp.ones((6, 5, 8))
      >>> variables = model.init(jax.random.key(0), fields)
      >>> found = pattern_selection(model, variables, [fields[:3], fields[3:]])
      >>> found.weights.shape, found.fields.shape, found.apart.shape
      ((2, 4), (2, 2, 5), (2, 2))
    """

    def sums(sown):
        found = {}
        for path, x in jax.tree_util.tree_leaves_with_path(sown):
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            found["/".join(names[-3:-1])] = x  # of a module called twice, the last
        reads = []
        while (name := f"groups_read_{len(reads)}/attention") in found:
            reads.append(found[name])
        if "selector/gates" not in found or len({x.shape for x in reads}) != 1:
            raise ValueError(
                "`model` must select patterns of groups that read fields in every "
                "block, see `extractor` and `carry` of `mtjax.systems.apem.APEMConfig`."
            )
        alpha = found["selector/gates"]
        attention = jnp.stack([jnp.mean(x, axis=1) for x in reads], axis=1)
        shares = alpha.reshape(*alpha.shape[:2], *attention.shape[1:3])
        fields = jnp.einsum("btlg,blgf->ltf", shares, attention)
        gaps = jnp.abs(alpha[:, :, None] - alpha[:, None])
        apart = jnp.sum(jnp.sum(gaps, axis=-1) / 2, axis=0)
        weights = jnp.sum(alpha, axis=0)
        return {"weights": weights, "fields": fields, "apart": apart}, len(alpha)

    means = mean_of_sown(model, variables, batches, sums)
    if not means:
        raise ValueError("`batches` must hold an example, got none.")
    return PatternSelection(**means)
