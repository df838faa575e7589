"""Which task vectors to build on: the best few, or random ones as a baseline."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from mtjax.merging.coefficients import init_coefficients, merge_with_coefficients
from mtjax.merging.match import by_name, is_float, named_leaves


def select(
    vectors: PyTree,
    scores: Mapping[str, Float[Array | np.ndarray, " models"]]
    | Float[Array | np.ndarray, " models"],
    budget: int,
    *,
    blockwise: bool = True,
) -> PyTree:
    """Keeps so many task vectors with the largest scores.

    Args:
      vectors: all that there are.
      scores: by path as from `sensitivities`, or one per vector: `feature_scores`, or
        random numbers.
      budget: how many to keep, at least one.
      blockwise: keep other ones in every array, so that blocks of different tasks mix;
        False, or one score per vector: those with the largest sum of scores.

    Returns:
      Task vectors in their order, fewer of them. All of them if the budget is that.

    Raises:
      ValueError: if the budget is more than there are, or less than one.

    Example:
      >>> vectors = {"w": jnp.arange(3.0)[:, None], "b": jnp.arange(3.0)[:, None]}
      >>> scores = {"w": jnp.array([5.0, 1.0, 1.0]), "b": jnp.array([0.0, 1.0, 2.0])}
      >>> print(select(vectors, scores, 1))
      {'b': Array([[2.]], dtype=float32), 'w': Array([[0.]], dtype=float32)}
    """
    paths = named_leaves(vectors)
    number = len(next(iter(paths.values())))
    if not 1 <= budget <= number:
        raise ValueError(f"`budget` must be in 1 to {number}, got {budget!r}.")
    if not isinstance(scores, Mapping):
        scores = {path: np.asarray(scores) for path in paths}
    if not blockwise:
        total = np.sum([np.asarray(scores[path]) for path in paths], axis=0)
        scores = dict.fromkeys(paths, total)
    best = lambda row: np.sort(np.argsort(-np.asarray(row), kind="stable")[:budget])
    leaves = [rows[best(scores[path])] for path, rows in paths.items()]
    return jax.tree.unflatten(jax.tree.structure(vectors), leaves)


def sensitivities(
    objective: Callable[[PyTree, Any], Any],
    base: PyTree,
    vectors: PyTree,
    batches: Iterable[Any],
) -> dict[str, Float[np.ndarray, " models"]]:
    r"""How steep the objective is in every coefficient, at the base.

    .. math:: |\partial L / \partial \lambda_i^j| = |\langle
              \partial L / \partial \theta^j, \tau_i^j \rangle|

    Args:
      objective: :math:`L`, `objective(params, batch)`, a scalar.
      base: where slopes are taken.
      vectors: all that there are.
      batches: over which slopes are averaged, at least one.

    Returns:
      By path one number per task vector.

    Raises:
      ValueError: if there is no batch.
    """

    @jax.jit
    @jax.grad
    def slopes_of(coefficients, base, vectors, batch):
        params = merge_with_coefficients(base, vectors, coefficients)
        return objective(params, batch)

    start = init_coefficients(base, vectors, "layer", 0.0)
    found = [slopes_of(start, base, vectors, batch) for batch in batches]
    if not found:
        raise ValueError("`batches` must hold at least one batch, got none.")
    return jax.tree.map(lambda *x: np.abs(np.mean(x, axis=0)), *found)


def feature_scores(
    features: Float[Array | np.ndarray, "examples features"],
    known: Mapping[str, Float[Array | np.ndarray, "_ features"]],
) -> Float[np.ndarray, " models"]:
    """How near the tasks of the vectors are to a new one: less the distance of means.

    Args:
      features: of examples of the new task, from the base.
      known: of examples of every task that has a vector, by its name.

    Returns:
      Scores in the order of the names, as task vectors are.
    """
    center = np.mean(features, axis=0)
    away = [np.linalg.norm(np.mean(x, 0) - center) for x in by_name(known).values()]
    return -np.array(away)


def random_vectors(base: PyTree, number: int, *, key: Key[Array, ""]) -> PyTree:
    """A random basis in the place of task vectors, as a baseline.

    Args:
      base: its arrays give mean and standard deviation of their Gaussians.
      number: of vectors.
      key: of the draw.

    Returns:
      A tree like task vectors. An array of equal numbers has constant vectors.
    """

    def leaf(path, x):
        if not is_float(x):
            return None
        x, own = jnp.asarray(x, jnp.float32), zlib.crc32(path.encode())
        noise = jax.random.normal(jax.random.fold_in(key, own), (number, *x.shape))
        return jnp.mean(x) + jnp.std(x) * noise

    leaves = [leaf(path, x) for path, x in named_leaves(base).items()]
    return jax.tree.unflatten(jax.tree.structure(base), leaves)
