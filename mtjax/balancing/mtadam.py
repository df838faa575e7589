"""MTAdam: Adam with moments of its own for each task."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer


class MTAdamState(NamedTuple):
    """State of `mtadam`.

    Attributes:
      steps: `(tasks,)` int32, steps in which the task was present.
      norms: params-shaped, `(tasks,)` float32: averaged norms of the gradients.
      first: params-shaped, `(tasks, *leaf.shape)` float32: averaged gradients.
      second: params-shaped, `(tasks, *leaf.shape)` float32: averaged squares.
    """

    steps: Array
    norms: Any
    first: Any
    second: Any


def mtadam(
    num_tasks: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each task moments of its own, of gradients that are equally long per leaf.

    In every leaf, each task's gradient is brought to the averaged length of the first
    task's, :math:`\hat g_t = n_1 / n_t \, g_t`; :math:`m_t` and :math:`v_t` are its
    bias-corrected moments as in Adam, and the update is
    :math:`\sum_t m_t / (\max_t \sqrt{v_t} + \epsilon)`.

    It takes the place of the balancer and of Adam: put `optax.scale_by_learning_rate`
    behind it.

    Args:
      num_tasks: number of tasks.
      b1: decay of the averaged gradients, in [0, 1).
      b2: decay of the averaged squares, in [0, 1).
      b3: decay of the averaged norms, in [0, 1).
      eps: :math:`\epsilon`, positive.

    Returns:
      A transform with state, 2 K times the size of the parameters. Absent tasks keep
      theirs, and it does not move the parameters.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = mtadam(2)
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 0.1]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(grads[0]))[0])
      [1. 1.]

    References:
      MTAdam: Automatic Balancing of Multiple Training Loss Terms, 2021, algorithm 1 and
      its public code: the sum over the tasks, the largest second moment, and the norms
      of the first present task that has a gradient in the leaf.
    """
    for name, decay in (("b1", b1), ("b2", b2), ("b3", b3)):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`{name}` must be in [0, 1), got {decay}.")
    if eps <= 0:
        raise ValueError(f"`eps` must be positive, got {eps}.")

    def init(params):
        zeros = lambda p: jnp.zeros((num_tasks, *jnp.shape(p)), jnp.float32)
        return MTAdamState(
            jnp.zeros(num_tasks, jnp.int32),
            jax.tree.map(lambda _: jnp.zeros(num_tasks, jnp.float32), params),
            jax.tree.map(zeros, params),
            jax.tree.map(zeros, params),
        )

    def update(grads, state, step):
        present, steps = step.present, state.steps + step.present

        def advance(g, norms, first, second):
            over = lambda x: x.reshape(-1, *[1] * (g.ndim - 1))
            row = jnp.where(over(present), g.astype(jnp.float32), 0.0)
            lengths = jnp.sqrt(jnp.sum(row**2, axis=tuple(range(1, g.ndim))))
            mixed = b3 * norms + (1.0 - b3) * lengths
            norms = jnp.where(state.steps == 0, lengths, mixed)
            usable = present & (norms > 0)
            anchor = norms[jnp.argmax(usable)]
            row = row * over(jnp.where(usable, anchor / jnp.where(usable, norms, 1), 1))
            first = b1 * first + (1.0 - b1) * row
            second = b2 * second + (1.0 - b2) * row**2
            counts = jnp.maximum(steps, 1)
            roots = jnp.sqrt(second / over(1.0 - b2**counts))
            largest = jnp.max(jnp.where(over(present), roots, 0.0), axis=0)
            mean = jnp.where(over(present), first / over(1.0 - b1**counts), 0.0)
            total = jnp.sum(mean, axis=0) / (largest + eps)
            return total.astype(g.dtype), norms, first, second

        stacked, structure = jax.tree.flatten(grads.stack())
        before = [jax.tree.leaves(x) for x in state[1:]]
        leaves = [advance(*x) for x in zip(stacked, *before, strict=True)]
        updates, *after = (structure.unflatten(x) for x in zip(*leaves, strict=True))

        def keep(new, old):
            # A gradient that is not finite shows in the update alone.
            moves = jnp.isfinite(new) & present.reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(moves, new, old)

        kept = (jax.tree.map(keep, n, o) for n, o in zip(after, state[1:], strict=True))
        return updates, MTAdamState(steps, *kept)

    return balancer("mtadam", init, update, num_tasks=num_tasks)
