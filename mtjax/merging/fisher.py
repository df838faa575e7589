"""Fisher merging: every element from the models that are sure of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from mtjax.merging.match import by_name, check_match, is_float, named_leaves

Labels = Literal["expected", "sampled", "given"]


def fisher_information(
    logits_fn: Callable[[PyTree, Any], Float[Array, "batch classes"]],
    params: PyTree,
    batches: Iterable[Any],
    *,
    labels: Labels = "expected",
    key: Key[Array, ""] | None = None,
) -> PyTree:
    r"""The diagonal of the Fisher information of a classifier.

    $$F = \frac{1}{N} \sum_x \mathbb{E}_{y \sim p(y | x)}
      \bigl(\nabla_\theta \log p(y | x)\bigr)^2$$

    Args:
      logits_fn: from parameters and inputs to logits, `(batch, classes)`. Examples must
        not depend on each other.
      params: of the model; the tree that is merged.
      batches: of inputs; or of pairs of inputs and integer labels, if these are given.
        Some 256 examples are usual. Memory is that of one gradient per example of a
        batch.
      labels: `"expected"` sums over all classes with the model's probabilities, exact;
        `"sampled"` draws one label per example from them; `"given"` takes the data's:
        the empirical Fisher, which is another quantity.
      key: for sampled labels.

    Returns:
      A tree like `params`, float32, not negative.

    Raises:
      ValueError: if there is no batch, or `key` is missing.

    References:
      Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS, 2022.
    """
    if labels == "sampled" and key is None:
        raise ValueError("`key` must be given to sample labels.")

    def squares(example, weights):
        """Of one example: the weighted sum over classes of squared gradients."""

        def log_likelihoods(params):
            one = jax.tree.map(lambda x: x[None], example)
            return jax.nn.log_softmax(logits_fn(params, one)[0])

        rows = jax.jacrev(log_likelihoods)(params)
        return jax.tree.map(
            lambda row: jnp.tensordot(weights, jnp.square(row.astype(jnp.float32)), 1),
            rows,
        )

    @jax.jit
    def summed(batch, key):
        inputs, given = batch if labels == "given" else (batch, None)
        logits = logits_fn(params, inputs)
        weights = jax.nn.softmax(logits)
        if labels != "expected":
            drawn = given if labels == "given" else jax.random.categorical(key, logits)
            weights = jax.nn.one_hot(drawn, logits.shape[-1])
        found = jax.vmap(squares)(inputs, weights)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), found), len(logits)

    total, number = None, 0
    for i, batch in enumerate(batches):
        own = jax.random.fold_in(key, i) if key is not None else None
        part, count = summed(batch, own)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        number += int(count)
    if total is None:
        raise ValueError("`batches` must hold at least one batch, got none.")
    return jax.tree.map(lambda x: x / number, total)


def fisher_average(
    models: Mapping[str, PyTree] | Sequence[PyTree],
    fishers: Mapping[str, PyTree] | Sequence[PyTree],
    *,
    weights: Sequence[float | int] | None = None,
    normalise: bool = False,
    eps: float = 1e-6,
) -> PyTree:
    r"""The average of models, weighted by their Fisher information.

    $$\theta = \sum_t w_t F_t \odot \theta_t \big/ \sum_t w_t F_t$$

    Args:
      models: trees of one structure, by name (in the order of the names) or in a
        sequence.
      fishers: what `fisher_information` returned for each, in the same way.
      weights: one number per model; equal by default.
      normalise: divide each model's Fisher information by its norm over all parameters,
        so that none counts for more because its losses are larger.
      eps: is added to every Fisher information; elements that no model is sure of are
        averaged.

    Returns:
      A tree like the models, in the dtypes of the first. Leaves that are not floating
      point are the first model's.

    Raises:
      ValueError: if trees do not match or `weights` has another number of entries.

    Example:
      >>> models = [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([3.0, 3.0])}]
      >>> fishers = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}]
      >>> print(fisher_average(models, fishers)["w"])
      [2. 2.999998]

    References:
      Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS, 2022.
    """
    named = by_name(models)
    columns = {name: named_leaves(tree) for name, tree in named.items()}
    sure = {name: named_leaves(tree) for name, tree in by_name(fishers).items()}
    if sorted(columns) != sorted(sure):
        raise ValueError(
            f"`fishers` must have the names of the models, {sorted(columns)}, got "
            f"{sorted(sure)}."
        )
    if weights is not None and len(weights) != len(columns):
        raise ValueError(
            f"`weights` must hold one value per model ({len(columns)}), got "
            f"{len(weights)}."
        )
    first = next(iter(columns.values()))
    check_match(first, columns, None)
    check_match(first, sure, lambda path: is_float(first[path]))
    given = [1.0] * len(columns) if weights is None else weights
    scales = {name: jnp.float32(weight) for name, weight in zip(columns, given)}
    if normalise:
        for name, leaves in sure.items():
            scales[name] = scales[name] / optax.tree.norm(leaves)

    def leaf(path):
        start = jnp.asarray(first[path])
        if not is_float(start):
            return start
        shares = {name: scales[name] * sure[name][path] + eps for name in columns}
        above = [shares[n] * c[path].astype(jnp.float32) for n, c in columns.items()]
        total = reduce(jnp.add, above) / reduce(jnp.add, shares.values())
        return total.astype(start.dtype)

    structure = jax.tree.structure(next(iter(named.values())))
    return jax.tree.unflatten(structure, [leaf(path) for path in first])
