"""Tasks that are absent from a batch keep their parameters and moments."""

import jax
import jax.numpy as jnp
import optax

from mtjax.balancing.balancer import keep_moments
from mtjax.gradients import TaskGradients


def freeze_absent(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Freezes what only absent tasks reach, although their gradients are zero.

    Momentum and weight decay move parameters under a zero gradient. This wrapper of a
    whole chain, from balancer to optimizer, leaves a parameter and its moments as they
    were, bit for bit, in steps in which none of the tasks that reach it is present.

    Args:
      optimizer: a chain that begins with a balancer.

    Returns:
      The same chain, with the same state, that looks at `present`. Without `present`
      it is the chain itself. Step counters inside the optimizer advance all the same.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> def losses_fn(params):
      ...     return {t: params["trunk"] * params[t] for t in ("a", "b")}
      >>> params = {"trunk": jnp.array(1.0), "a": jnp.array(1.0), "b": jnp.array(1.0)}
      >>> tx = freeze_absent(optax.chain(mtjax.pcgrad(), optax.adamw(0.1)))
      >>> losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
      >>> updates, _ = tx.update(
      ...     grads, tx.init(params), params, present=jnp.array([True, False])
      ... )
      >>> print(updates["a"] != 0, updates["b"] != 0)
      True False
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, *, present=None, **extra_args):
        new_updates, new_state = optimizer.update(
            updates, state, params, present=present, **extra_args
        )
        if present is None:
            return new_updates, new_state
        if not isinstance(updates, TaskGradients):
            updates = TaskGradients.from_stacked(updates)
        split = updates.split
        row = {task: i for i, task in enumerate(split.tasks)}
        present = jnp.asarray(present, bool)
        # What no task reaches at all is none of this wrapper's business.
        moves = [
            jnp.any(present[jnp.array([row[t] for t in owners])]) if owners else True
            for owners in split.owner_leaves()
        ]
        moves = jax.tree.unflatten(jax.tree.structure(split.shared), moves)
        new_updates = jax.tree.map(
            lambda m, u: jnp.where(m, u, jnp.zeros_like(u)), moves, new_updates
        )
        return new_updates, keep_moments(optimizer, new_state, state, moves)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
