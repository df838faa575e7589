"""Coefficients by task, layer or group of layers, and the merge they stand for."""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from mtjax.merging.match import named_leaves
from mtjax.merging.vectors import merge

Granularity = Literal["task", "layer"] | Callable[[str], str]
"""One coefficient per task, per array and task, or per group that the path names."""

Coefficients = Mapping[str, Float[Array | np.ndarray, " models"]]
"""By the name of the group of leaves that shares them."""


def group_of(granularity: Granularity) -> Callable[[str], str]:
    """The function from a path to the name of its group.

    Args:
      granularity: `"task"`: all leaves are the group `"all"`; `"layer"`: every leaf
        has its own, named by its path; or the function itself.

    Returns:
      The function.

    Raises:
      ValueError: if it is none of these.
    """
    if callable(granularity):
        return granularity
    if granularity not in ("task", "layer"):
        raise ValueError(
            "`granularity` must be 'task', 'layer' or a function from a path to the "
            f"name of its group, got {granularity!r}."
        )
    return lambda path: "all" if granularity == "task" else path


def init_coefficients(
    base: PyTree,
    vectors: PyTree,
    granularity: Granularity = "task",
    value: float = 0.3,
) -> dict[str, Float[Array, " models"]]:
    """Equal coefficients for all groups of leaves and all models: task arithmetic.

    Args:
      base: the model that all were fine-tuned from.
      vectors: what `mtjax.merging.task_vectors` returned.
      granularity: see `group_of`.
      value: of all coefficients.

    Returns:
      By name of the group: `"all"` for `"task"`, the path for `"layer"`.

    Raises:
      ValueError: if the vectors do not fit to the base; the message names the path.

    Example:
      >>> base = {"block": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}}
      >>> vectors = jax.tree.map(lambda x: jnp.stack([x, -x]), base)
      >>> list(init_coefficients(base, vectors, "layer"))
      ['block/b', 'block/w']
      >>> print(init_coefficients(base, vectors, lambda path: path.split("/")[0]))
      {'block': Array([0.3, 0.3], dtype=float32)}
    """
    rows, leaves = named_leaves(vectors), named_leaves(base)
    models = len(next(iter(rows.values())))
    for path, row in rows.items():
        if path not in leaves or row.shape != (models, *jnp.shape(leaves[path])):
            found = jnp.shape(leaves[path]) if path in leaves else "nothing"
            raise ValueError(
                f"`vectors` must be like the base with a leading axis of {models} "
                f"models, got {row.shape} at {path!r}, where the base has {found}; "
                "make them with `mtjax.merging.task_vectors`."
            )
    start = jnp.full(models, value, jnp.float32)
    return {group_of(granularity)(path): start for path in rows}


def effective_coefficients(
    coefficients: Coefficients,
    vectors: PyTree,
    granularity: Granularity = "layer",
    *,
    clamp: bool = False,
) -> dict[str, Float[Array, " models"]]:
    """The coefficients that every leaf is merged with: what to save and to look at.

    Args:
      coefficients: by group, as from `init_coefficients`.
      vectors: what is merged.
      granularity: what the coefficients were made with.
      clamp: clip to [0, 1]. The slope is 1 inside, limits included, and 0 outside.

    Returns:
      By path: coefficients of granularity `"layer"` that need no clamp any more.

    Raises:
      ValueError: if there is not exactly one array, with a number per model, per group.
    """
    rows, group = named_leaves(vectors), group_of(granularity)
    models, groups = len(next(iter(rows.values()))), set(map(group, rows))
    shapes = {name: jnp.shape(x) for name, x in coefficients.items()}
    if shapes != dict.fromkeys(groups, (models,)):
        raise ValueError(
            f"`coefficients` must hold {models} numbers for every group of leaves, got "
            f"none for {sorted(groups - shapes.keys())}, unknown groups "
            f"{sorted(shapes.keys() - groups)}, shapes {sorted({*shapes.values()})}. "
            "Use the granularity and the task vectors that they were made with."
        )
    read = _clip if clamp else lambda x: x
    return {p: read(jnp.asarray(coefficients[group(p)], jnp.float32)) for p in rows}


def merge_with_coefficients(
    base: PyTree,
    vectors: PyTree,
    coefficients: Coefficients,
    granularity: Granularity = "layer",
    *,
    clamp: bool = False,
) -> PyTree:
    r"""The merged model, differentiable in its coefficients.

    .. math:: \theta^\ell = \theta_0^\ell + \sum_k \lambda_k^\ell \tau_k^\ell

    Args:
      base: :math:`\theta_0`.
      vectors: :math:`\tau`, from `mtjax.merging.task_vectors` or `ties_vectors`; may be
        bfloat16, sums are float32.
      coefficients: :math:`\lambda`, as in `effective_coefficients`.
      granularity: as there.
      clamp: as there.

    Returns:
      A tree like the base, in its dtypes.

    Raises:
      ValueError: as `effective_coefficients` states.

    Example:
      >>> base, vectors = {"w": jnp.ones(2)}, {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> print(merge_with_coefficients(base, vectors, {"w": jnp.array([0.5, 0.25])}))
      {'w': Array([1.5, 1.5], dtype=float32)}
    """
    by_path = effective_coefficients(coefficients, vectors, granularity, clamp=clamp)
    # Leaves without task vectors, such as counters, stay whatever stands here.
    leaves = [by_path.get(path, 0.0) for path in named_leaves(base)]
    tree = jax.tree.unflatten(jax.tree.structure(base), leaves)
    return merge(base, vectors, tree)


def clamped_share(coefficients: Coefficients) -> float:
    """The share of coefficients outside [0, 1], where a clamp keeps them from learning.

    Args:
      coefficients: before the clamp.

    Returns:
      From 0 to 1; a large one calls for a smaller learning rate, or no clamp.
    """
    values = np.concatenate([np.ravel(x) for x in coefficients.values()])
    return float(np.mean((values < 0) | (values > 1)))


def _clip(x: Array) -> Array:
    # `jnp.clip` has half the slope at the limits, where learning may start.
    return jnp.where(x < 0, 0.0, jnp.where(x > 1, 1.0, x))
