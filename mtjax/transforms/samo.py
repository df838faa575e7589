"""SAMO: one perturbation per task without a gradient per task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, default_key
from mtjax.gradients import TaskGradients
from mtjax.transforms.perturbation import (
    check_params,
    check_radius,
    gradients_at,
    moved,
    rows_of_present,
    scaled_norm,
    uphill,
)


class SAMOState(NamedTuple):
    """State of `samo`.

    Attributes:
      key: `()` random key of the next step's directions.
    """

    key: Array


def samo(
    *,
    rho: float = 0.003,
    beta: float = 0.1,
    zo_eps: float = 0.01,
    adaptive: bool = False,
    key: Array | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes each task's gradient uphill of all losses and, guessed, of its own.

    The direction uphill of task :math:`i` on shared parameters is, leaf by leaf,
    :math:`g_i = (1 - \beta)\, g + \beta\, \|g\|\, \hat g_i / \|\hat g_i\|` with the
    gradient :math:`g` of all losses together and the guess
    :math:`\hat g_i = \frac{L_i(\theta + \mu z_i) - L_i(\theta - \mu z_i)}{2\mu} z_i`
    from two forward passes along a random normal :math:`z_i`. The tasks' gradients at
    :math:`\theta + \rho\, g_i / \|g_i\|` (on its own parameters: along its own
    gradient) go on to the balancer behind it:
    `optax.chain(samo(), mtjax.cagrad(), optax.adam(1e-3))`.

    Args:
      rho: :math:`\rho`, at least 0, on shared and on each task's own parameters.
      beta: weight of the guess, from 0 to 1.
      zo_eps: :math:`\mu > 0`.
      adaptive: whether perturbations are relative to the size of each parameter.
      key: random key of the directions, `jax.random.key(0)` if not given. A `key` that
        is passed to the update takes its place in that step.
      axis_name: inside `shard_map` or `pmap`, the axis over which the batch is split,
        as in `mtjax.value_and_task_grads`.

    Returns:
      A transform from task gradients to task gradients, with the key as its state, that
      needs `losses_fn` and `params`. With K tasks it costs 2 K forward passes and K
      forward and backward passes, and memory of K gradients; the compiled program
      grows with K. Batch statistics and dropout: see `task_sam`.

    Raises:
      ValueError: if an argument is out of its range, or a needed one is not passed to
        the update.

    References:
      SAMO: A Lightweight Sharpness-Aware Approach for Multi-Task Optimization with
      Joint Global-Local Perturbation, 2025; steps and defaults follow its published
      code for CityScapes, where "leaf" is each weight and each bias by itself.
      Deviation: there the guesses see a model in evaluation mode, here the same
      `losses_fn` as everything else. A guess of zero is left out.
    """
    check_radius("rho", rho)
    if not 0 <= beta <= 1:
        raise ValueError(f"`beta` must be between 0 and 1, got {beta}.")
    if not zo_eps > 0:
        raise ValueError(f"`zo_eps` must be positive, got {zo_eps}.")
    start = default_key(key)

    def init(params):
        del params
        return SAMOState(jnp.copy(start))

    def update(grads, state, step):
        check_params("samo", step.params)
        next_key, step_key = jax.random.split(state.key)
        if step.key is not None:
            step_key = step.key
        leaves, structure = jax.tree.flatten(step.params)
        is_shared = jax.tree.leaves(grads.shared)
        together = jax.tree.leaves(grads.combine())

        def loss(task, steps):
            point = moved(step.params, jax.tree.unflatten(structure, steps))
            value = step.losses_fn(point)[task].astype(jnp.float32)
            return value if axis_name is None else jax.lax.pmean(value, axis_name)

        def point(i, task):
            task_key = jax.random.fold_in(step_key, i)
            draws = [
                jax.random.normal(jax.random.fold_in(task_key, j), x.shape)
                if shared
                else jnp.zeros(x.shape)
                for j, (x, shared) in enumerate(zip(leaves, is_shared))
            ]
            rise = loss(task, [zo_eps * z for z in draws])
            rise = jnp.sign(rise - loss(task, [-zo_eps * z for z in draws]))
            mixed = [
                _mixed(g, rise * z, beta)
                if shared
                else (g if task in owners else jnp.zeros_like(g))
                for g, z, shared, owners in zip(
                    together, draws, is_shared, grads.split.owner_leaves()
                )
            ]
            steps = uphill(
                jax.tree.unflatten(structure, mixed),
                step.params,
                grads.shared,
                rho_shared=rho,
                rho_own=rho,
                adaptive=adaptive,
            )
            return moved(step.params, steps)

        points = [point(i, task) for i, task in enumerate(grads.tasks)]
        rows = gradients_at(points, step.losses_fn, grads.tasks, axis_name)
        rows = rows_of_present(rows, step.present, grads.factors)
        return TaskGradients.from_stacked(rows, split=grads.split), SAMOState(next_key)

    return balancer("samo", init, update, needs=("losses_fn",))


def _mixed(gradient: Array, guess: Array, beta: float) -> Array:
    """The gradient with a share of another direction of the same length."""
    gradient = gradient.astype(jnp.float32)
    unit, norm = scaled_norm([gradient])
    other = jnp.sqrt(jnp.sum(guess**2))
    direction = guess / jnp.where(other > 0, other, 1.0)
    return (1 - beta) * gradient + beta * unit * norm * direction
