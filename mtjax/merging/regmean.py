"""RegMean: the linear layers that reproduce all models' outputs best."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtjax.merging.average import average
from mtjax.merging.match import by_name, named_leaves

Grams = Mapping[str, Float[Array, "inputs inputs"]]


def regmean(
    models: Mapping[str, PyTree] | Sequence[PyTree],
    grams: Mapping[str, Grams] | Sequence[Grams],
    *,
    off_diagonal: float = 0.95,
) -> PyTree:
    r"""Merges linear layers by least squares on their inputs, averages the rest.

    $$W = \Bigl(\sum_t C_t\Bigr)^{-1} \sum_t C_t W_t, \qquad C_t = X_t^\top X_t$$

    minimises $\sum_t \|X_t W - X_t W_t\|^2$ for kernels of inputs by outputs.

    Args:
      models: trees of one structure, by name or in a sequence.
      grams: of each model: by the path of a kernel ("layers_0/kernel") the inner
        products of its inputs, `(inputs, inputs)`; `mtjax.nn.dense_grams` collects
        them. A kernel with more axes is taken with its first ones as inputs, as many
        as the inner products have.
      off_diagonal: factor of inner products of different inputs, in [0, 1]; below 1 it
        keeps the sum invertible where there are few examples (0.9 for T5).

    Returns:
      A tree like the models.

    Raises:
      ValueError: if trees do not match, a path is unknown or has another shape, or
        `off_diagonal` is out of range.

    References:
      Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models",
      ICLR, 2023.
    """
    if not 0 <= off_diagonal <= 1:
        raise ValueError(f"`off_diagonal` must be in [0, 1], got {off_diagonal!r}.")
    columns = {name: named_leaves(tree) for name, tree in by_name(models).items()}
    inner = by_name(grams)
    if sorted(columns) != sorted(inner):
        raise ValueError(
            f"`grams` must have the names of the models, {sorted(columns)}, got "
            f"{sorted(inner)}."
        )
    merged = average()(None, models)
    leaves = named_leaves(merged)
    for path in next(iter(inner.values())):
        if path not in leaves:
            raise ValueError(f"`grams` has {path!r}, which is no parameter.")
        pairs = [(inner[name][path], columns[name][path]) for name in columns]
        leaves[path] = _solved(path, pairs, off_diagonal)
    return jax.tree.unflatten(jax.tree.structure(merged), list(leaves.values()))


def regmean_plus_plus(
    models: Mapping[str, PyTree] | Sequence[PyTree],
    grams_fn: Callable[[str, PyTree], Grams],
    layers: Sequence[Sequence[str]],
    *,
    off_diagonal: float = 0.95,
) -> PyTree:
    r"""RegMean, layer by layer, with the inputs that the merged model will have.

    Args:
      models: trees of one structure, by name or in a sequence.
      grams_fn: from a model's name and parameters to the inner products of the inputs
        of its kernels on that model's data; called once per model and layer.
      layers: paths of the kernels, in the order in which the model runs them; those of
        one entry are merged at once.
      off_diagonal: see `regmean`.

    Returns:
      A tree like the models.

    Raises:
      ValueError: as `regmean`.

    References:
      Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of
      Regression Mean for Model Merging", 2025; the order of layers follows its text.
    """
    named = dict(by_name(models))
    merged = average()(None, named)
    done: dict[str, Array] = {}
    for paths in layers:
        grams = {}
        for name, model in named.items():
            found = grams_fn(name, _replaced(model, done))
            if unknown := [path for path in paths if path not in found]:
                raise ValueError(f"`grams_fn` gave nothing for {unknown[0]!r}.")
            grams[name] = {path: found[path] for path in paths}
        solved = named_leaves(regmean(named, grams, off_diagonal=off_diagonal))
        done |= {path: solved[path] for path in paths}
    return _replaced(merged, done)


def _solved(path, pairs, off_diagonal):
    """The kernel of least squares; in float32, by a symmetric solve."""
    kernel = pairs[0][1]
    size = len(pairs[0][0])
    if (
        size == 0
        or kernel.size % size
        or any(g.shape != (size, size) for g, _ in pairs)
    ):
        raise ValueError(
            f"`grams` of {path!r} must be square and fit the kernel's inputs, got "
            f"{[g.shape for g, _ in pairs]} for a kernel of shape {kernel.shape}."
        )
    above, below = 0.0, 0.0
    for gram, weights in pairs:
        shrunk = off_diagonal * gram + (1 - off_diagonal) * jnp.diag(jnp.diag(gram))
        below = below + shrunk
        above = above + shrunk @ weights.reshape(size, -1).astype(jnp.float32)
    # Inputs that are always zero leave their weights to the average.
    dead = jnp.diag(below) <= 0
    mean = sum(w.reshape(size, -1).astype(jnp.float32) for _, w in pairs) / len(pairs)
    below = below + jnp.diag(dead.astype(jnp.float32))
    above = jnp.where(dead[:, None], mean, above)
    solved = jnp.linalg.solve(below, above)
    return solved.reshape(kernel.shape).astype(kernel.dtype)


def _replaced(tree, leaves):
    found = named_leaves(tree) | leaves
    return jax.tree.unflatten(jax.tree.structure(tree), list(found.values()))
