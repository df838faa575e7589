"""GradDrop: gradient sign dropout."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, default_key


class GradDropState(NamedTuple):
    """State of `graddrop`.

    Attributes:
      key: `()` random key of the next step.
    """

    key: Array


def graddrop(
    *, leak: Sequence[float] | None = None, key: Array | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Lets one sign survive in every element, with the odds of its share.

    With the purity :math:`P = \tfrac12 (1 + \sum_t g_t / \sum_t |g_t|)` and one uniform
    draw :math:`U` per element, positive entries survive where :math:`P > U`, negative
    ones where :math:`P < U`; survivors are added up. A leak :math:`\ell_t` lets
    :math:`\ell_t g_t` through in any case.

    Args:
      leak: :math:`\ell_t \in [0, 1]` per task, in the order of the sorted names; zero
        if not given.
      key: random key, `jax.random.key(0)` if not given. A `key` that is passed to the
        update takes its place in that step.

    Returns:
      A balancer, with the key as its state. It works element by element, so it needs
      all tasks' gradients in memory (K backward passes).

    Raises:
      ValueError: if a leak is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> tx = graddrop()
      >>> grads = jnp.array([[1.0, 2.0], [3.0, 1.0]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [4. 3.]

    References:
      Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout,
      2020, algorithm 1, on the gradients of the shared parameters (where the paper
      applies it to those of the shared representation).
    """
    if leak is not None and not all(0.0 <= x <= 1.0 for x in np.asarray(leak)):
        raise ValueError(f"`leak` must be in [0, 1] for every task, got {leak}.")
    start = default_key(key)

    def init(params):
        del params
        return GradDropState(jnp.copy(start))

    def update(grads, state, step):
        if leak is not None and len(leak) != len(grads.tasks):
            raise ValueError(
                f"`leak` must have one entry for each of the tasks {grads.tasks}, got "
                f"{len(leak)}."
            )
        next_key, step_key = jax.random.split(state.key)
        if step.key is not None:
            step_key = step.key
        stacked, structure = jax.tree.flatten(grads.stack())
        is_shared = jax.tree.leaves(grads.shared)
        keys = jax.random.split(step_key, len(stacked))

        leaks = [0.0] * len(grads.tasks) if leak is None else list(leak)

        def drop(g, shared, key):
            # Task by task: one fused pass, where reductions over a task axis take many.
            rows = [jnp.where(p, row, 0) for p, row in zip(step.present, g)]
            return sum(_keep_one_sign(rows, leaks, key) if shared else rows)

        leaves = [drop(g, s, k) for g, s, k in zip(stacked, is_shared, keys)]
        return structure.unflatten(leaves), GradDropState(next_key)

    return balancer("graddrop", init, update)


def _keep_one_sign(
    rows: Sequence[Array], leaks: Sequence[float], key: Array
) -> list[Array]:
    wide = [row.astype(jnp.float32) for row in rows]
    total = sum(jnp.abs(row) for row in wide)
    purity = 0.5 * (1.0 + sum(wide) / jnp.where(total > 0, total, 1.0))
    # Where all signs agree the purity is 0 or 1 and no draw in (0, 1) changes that.
    draw = jax.random.uniform(key, purity.shape, minval=1e-7)
    survive = [jnp.where(row > 0, purity > draw, purity < draw) for row in rows]
    return [
        jnp.where(stays, row, leak * row)
        for row, stays, leak in zip(rows, survive, leaks)
    ]
