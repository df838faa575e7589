"""Gradient accumulation: each loss averaged over micro-batches, one at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulated(
    losses_fn: Any,
    num_micro: int,
    *,
    with_model_state: bool,
    with_key: bool,
    has_aux: bool,
) -> Any:
    """Averages the losses of a function over micro-batches.

    The result is again a ``losses_fn``, of the mean losses. Its per-task gradients are
    therefore averaged before any balancer sees them, which a sum of balanced
    micro-batch updates would not do. Each micro-batch is rematerialized in the backward
    pass, so that the activations of only one are in memory.

    Args:
      losses_fn: see `make_train_step`.
      num_micro: number of micro-batches, at least 1; with 1 the function is returned as
        it is. Micro-batch ``i`` takes the rows ``i, i + num_micro, ...``, so that a
        batch that is sharded over devices stays where it is.
      with_model_state: see `make_train_step`.
      with_key: see `make_train_step`.
      has_aux: see `make_train_step`.

    Returns:
      A function with the signature of ``losses_fn``.
    """
    if num_micro == 1:
        return losses_fn

    def micro(params, rows, model_state, key):
        inputs = {}
        if with_model_state:
            inputs["model_state"] = model_state
        if with_key:
            inputs["key"] = key
        found = losses_fn(params, rows, **inputs)
        return unpack(found, with_model_state=with_model_state, has_aux=has_aux)

    micro = jax.checkpoint(micro)

    def mean_losses(params, batch, *, model_state=None, key=None):
        parts = split_batch(batch, num_micro)
        keys = None if key is None else jax.random.split(key, num_micro)
        losses, model_state, aux = _loop(micro)(params, parts, model_state, keys)
        losses = jax.tree.map(lambda total: total / num_micro, losses)
        if with_model_state:
            return losses, ((model_state, aux) if has_aux else model_state)
        return (losses, aux) if has_aux else losses

    return mean_losses


def unpack(
    found: Any, *, with_model_state: bool, has_aux: bool
) -> tuple[Any, Any, Any]:
    """Sorts what a ``losses_fn`` returned into losses, model state and ``aux``.

    Args:
      found: the return value.
      with_model_state: see `make_train_step`.
      has_aux: see `make_train_step`.

    Returns:
      The three parts, ``None`` for those that the function does not return.
    """
    if with_model_state and has_aux:
        losses, (model_state, aux) = found
        return losses, model_state, aux
    if with_model_state:
        return found[0], found[1], None
    if has_aux:
        return found[0], None, found[1]
    return found, None, None


def split_batch(batch: Any, num_micro: int) -> Any:
    """Divides the leading axis of every array in a batch.

    Args:
      batch: pytree of arrays of shape ``(batch, ...)``; the sizes may differ between
        arrays (one batch per task). Arrays without axes go to every micro-batch.
      num_micro: number of micro-batches, at least 1.

    Returns:
      The same tree with arrays of shape ``(num_micro, batch / num_micro, ...)``.

    Raises:
      ValueError: if a leading axis cannot be divided.

    Example:
      >>> print(split_batch(jnp.arange(6), 2))
      [[0 2 4]
       [1 3 5]]
    """

    def split(path, leaf):
        if jnp.ndim(leaf) == 0:
            return jnp.broadcast_to(leaf, (num_micro,))
        rows, *rest = jnp.shape(leaf)
        if rows % num_micro:
            raise ValueError(
                "`batch` must have leading axes divisible by `accumulate`, got "
                f"{rows} rows for {num_micro} micro-batches in "
                f"batch{jax.tree_util.keystr(path)}; change one of the two."
            )
        return jnp.swapaxes(jnp.reshape(leaf, (-1, num_micro, *rest)), 0, 1)

    return jax.tree.map_with_path(split, batch)


def _loop(micro: Callable[..., Any]) -> Callable[..., Any]:
    # The CPU backend runs convolutions inside `scan` 20 to 60 times slower.
    return _unrolled(micro) if jax.default_backend() == "cpu" else _scanned(micro)


def _unrolled(micro):
    def run(params, parts, model_state, keys):
        total, auxes = None, []
        for i in range(len(jax.tree.leaves(parts)[0])):
            rows, key = jax.tree.map(lambda part, i=i: part[i], (parts, keys))
            losses, model_state, aux = micro(params, rows, model_state, key)
            total = losses if total is None else jax.tree.map(jnp.add, total, losses)
            auxes.append(aux)
        return total, model_state, jax.tree.map(lambda *a: jnp.stack(a), *auxes)

    return run


def _scanned(micro):
    def run(params, parts, model_state, keys):
        def body(carry, part):
            total, model_state = carry
            losses, model_state, aux = micro(params, part[0], model_state, part[1])
            return (jax.tree.map(jnp.add, total, losses), model_state), aux

        first = jax.tree.map(lambda part: part[0], (parts, keys))
        shapes = jax.eval_shape(micro, params, first[0], model_state, first[1])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[0])
        (total, model_state), aux = jax.lax.scan(
            body, (zeros, model_state), (parts, keys)
        )
        return total, model_state, aux

    return run
