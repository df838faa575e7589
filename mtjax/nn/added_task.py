"""A further task for a trained ranker, with everything else frozen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from mtjax.nn.task_leaves import is_shared


class Added(NamedTuple):
    """A ranker with a further task.

    Attributes:
      params: of the old ranker, and new values for the new task.
      trainable: like `params`, True where a value belongs to the new task.
    """

    params: PyTree
    trainable: PyTree


def add_task(old: PyTree, fresh: PyTree) -> Added:
    """Puts what a ranker has learnt into one with a further task.

    The new task must be the last of the larger ranker's `tasks`. Arrays with an axis of
    tasks (`mtjax.nn.is_shared` says which) keep their rows and get new ones.

    Args:
      old: parameters of the trained ranker.
      fresh: initial parameters of the larger one.

    Returns:
      Parameters, and which of them are to be trained: with `only` they alone are.

    Raises:
      ValueError: if an array of the old ranker has another shape in the larger one
        without being of several tasks: there is no frozen rest. So it is with PLE of
        several levels, whose shared gate has a weight for every task's expert.

    Example:
      >>> from mtjax.nn import MMoE
      >>> def start(*tasks):
      ...     init = jax.jit(MMoE(tasks).init)
      ...     return init(jax.random.key(0), jnp.ones((1, 3)))["params"]
      >>> added = add_task(start("click"), start("click", "like"))
      >>> print(added.trainable["task_gates"]["kernel"].any((1, 2)))
      [False  True]
    """
    learnt = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(old)}
    there = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(fresh)}
    if missing := sorted(set(learnt) - there):
        raise ValueError(f"`fresh` must have all arrays of `old`, it lacks {missing}.")

    def joined(path, new):
        path = _name(path)
        if path not in learnt:
            return new, jnp.ones(new.shape, bool)
        kept = learnt[path]
        if kept.shape == new.shape:
            return kept, jnp.zeros(new.shape, bool)
        if is_shared(path) or kept.shape[1:] != new.shape[1:] or len(kept) > len(new):
            raise ValueError(
                f"`fresh` must only have further rows of tasks, got {new.shape} in "
                f"place of {kept.shape} for {path}: it cannot stay frozen."
            )
        row = jnp.arange(len(new)).reshape(-1, *[1] * (new.ndim - 1))
        own = jnp.broadcast_to(row >= len(kept), new.shape)
        return jnp.concatenate([kept, new[len(kept) :]]), own

    both = jax.tree_util.tree_map_with_path(joined, fresh)
    part = lambda i: jax.tree.map(lambda _, pair: pair[i], fresh, both)
    return Added(part(0), part(1))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def only(trainable: PyTree) -> optax.GradientTransformation:
    """Sets updates of all else to zero; goes behind the optimizer.

    Args:
      trainable: True where a value may change.

    Returns:
      The transformation.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), only({"w": jnp.array([False, True])}))
      >>> grads = {"w": jnp.array([2.0, 2.0])}
      >>> print(tx.update(grads, tx.init(grads))[0]["w"])
      [ 0. -2.]
    """
    keep = lambda mask, update: jnp.where(mask, update, jnp.zeros_like(update))
    return optax.stateless(lambda updates, _: jax.tree.map(keep, trainable, updates))
