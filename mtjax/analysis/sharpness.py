"""How sharply each task's loss rises around the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtjax.gradients import value_and_task_grads
from mtjax.transforms.perturbation import LossesFn, check_radius, moved, uphill


class Sharpness(NamedTuple):
    """Sharpness of the tasks' losses; a pytree to log.

    Attributes:
      rise: `(tasks,)` float32, each task's loss at its perturbed point minus its loss.
      losses: `(tasks,)` float32, the losses at the parameters.
    """

    rise: Array
    losses: Array


def task_sharpness(
    losses_fn: LossesFn,
    params: Any,
    *,
    rho_shared: float = 0.05,
    rho_own: float | None = None,
    adaptive: bool = False,
    joint_norm: bool = False,
    axis_name: str | None = None,
) -> Sharpness:
    r"""Measures :math:`L_i(\theta + \epsilon_i) - L_i(\theta)` of each task.

    The perturbation is the one of `mtjax.task_sam`: uphill to first order, with norms
    and radii of their own on shared and on task-specific parameters.

    Args:
      losses_fn: `losses_fn(params) -> {task: loss}`, the data closed over. Randomness
        in it must be fixed.
      params: the parameters.
      rho_shared: radius on shared parameters, at least 0.
      rho_own: radius on each task's own parameters; `rho_shared` if not given.
      adaptive: whether perturbations are relative to the size of each parameter.
      joint_norm: one norm over shared and own parameters together.
      axis_name: inside `shard_map` or `pmap`, the axis over which the data are split,
        as in `mtjax.value_and_task_grads`.

    Returns:
      The sharpness, in the order of the sorted task names. It costs K backward passes
      and K + 1 forward passes for K tasks.

    Raises:
      ValueError: if a radius is negative.

    Example:
      >>> found = task_sharpness(lambda p: {"a": p @ p, "b": 3.0 * p @ p}, jnp.ones(4))
      >>> with jnp.printoptions(precision=4):
      ...     print(found.rise)
      [0.2025 0.6075]

    References:
      Improving Multi-task Learning via Seeking Task-based Flat Regions, 2022,
      section 5.
    """
    rho_own = rho_shared if rho_own is None else rho_own
    check_radius("rho_shared", rho_shared)
    check_radius("rho_own", rho_own)
    losses, grads = value_and_task_grads(losses_fn, axis_name=axis_name)(params)
    stacked = grads.stack()

    def loss_uphill(i, task):
        steps = uphill(
            jax.tree.map(lambda g: g[i], stacked),
            params,
            grads.shared,
            rho_shared=rho_shared,
            rho_own=rho_own,
            adaptive=adaptive,
            joint_norm=joint_norm,
        )
        loss = losses_fn(moved(params, steps))[task]
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name)

    before = jnp.stack([losses[task] for task in grads.tasks])
    after = jnp.stack([loss_uphill(i, task) for i, task in enumerate(grads.tasks)])
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    return Sharpness(rise=after - before, losses=before)
