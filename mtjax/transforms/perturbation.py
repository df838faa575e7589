"""Steps uphill from the parameters, and the tasks' gradients there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import loss_vector
from mtjax.gradients import TaskGradients, value_and_task_grads
from mtjax.gradients.split import path_name

PyTree = Any
LossesFn = Callable[[PyTree], Mapping[str, Array]]


def check_radius(name: str, radius: float) -> None:
    """Raises ValueError unless a radius is zero or positive."""
    if not radius >= 0:
        raise ValueError(f"`{name}` must not be negative, got {radius}.")


def check_params(name: str, params: PyTree) -> None:
    """Raises ValueError if there are no parameters to perturb."""
    if params is None:
        raise ValueError(
            f"`{name}` needs `params`; call `tx.update(grads, state, params, "
            "losses_fn=losses_fn)`."
        )


def uphill(
    grads: PyTree,
    params: PyTree,
    shared: PyTree,
    *,
    rho_shared: float,
    rho_own: float,
    adaptive: bool = False,
    joint_norm: bool = False,
) -> PyTree:
    r"""The step of a given length along which a loss grows fastest, to first order.

    :math:`\epsilon = \rho\, g / \|g\|`, or with `adaptive`
    :math:`\epsilon = \rho\, \theta^2 \odot g / \| |\theta| \odot g \|`; shared and
    task-specific parameters have a length of their own.

    Args:
      grads: params-shaped, the gradient :math:`g` of one loss; zero where the loss does
        not depend on a parameter.
      params: :math:`\theta`.
      shared: params-shaped, True where a leaf counts as shared.
      rho_shared: :math:`\rho` of shared parameters.
      rho_own: :math:`\rho` of all other parameters.
      adaptive: whether lengths are relative to each parameter's size.
      joint_norm: divide by the norm of the whole gradient instead of those of the two
        parts.

    Returns:
      :math:`\epsilon`, float32; zero where the gradient is.
    """
    sides, structure = jax.tree.flatten(shared)
    thetas = [jnp.abs(p.astype(jnp.float32)) for p in jax.tree.leaves(params)]
    slopes = [g.astype(jnp.float32) for g in jax.tree.leaves(grads)]
    if adaptive:
        slopes = [t * g for t, g in zip(thetas, slopes)]
    steps = list(slopes)
    for side, rho in ((True, rho_shared), (False, rho_own)):
        inside = [i for i, s in enumerate(sides) if s == side]
        measured = range(len(sides)) if joint_norm else inside
        unit, length = scaled_norm([slopes[i] for i in measured])
        for i in inside:
            steps[i] = rho * (slopes[i] / unit / length)
            if adaptive:
                steps[i] = thetas[i] * steps[i]
    return jax.tree.unflatten(structure, steps)


def moved(params: PyTree, steps: PyTree) -> PyTree:
    """The parameters after a step, in their own types."""
    return jax.tree.map(
        lambda p, s: (p.astype(jnp.float32) + s).astype(p.dtype), params, steps
    )


def rows_of_present(
    stacked: PyTree, present: Bool[Array, " tasks"], factors: Float[Array, " tasks"]
) -> PyTree:
    """Scales stacked gradients; those of absent tasks are zero even if they are NaN."""

    def masked(g):
        column = (-1, *[1] * (g.ndim - 1))
        scaled = g * factors.astype(g.dtype).reshape(column)
        return jnp.where(present.reshape(column), scaled, jnp.zeros_like(g))

    return jax.tree.map(masked, stacked)


def gradients_at(
    points: Sequence[PyTree],
    losses_fn: LossesFn,
    tasks: tuple[str, ...],
    axis_name: str | None = None,
) -> PyTree:
    """Each task's gradient at a point of its own.

    Unrolled over the tasks: batching over the parameters makes convolutions slow on a
    CPU, and what other tasks compute alone falls away.

    Args:
      points: parameters, one tree for each of the tasks.
      losses_fn: the losses as a function of the parameters.
      tasks: names of the tasks, in order.
      axis_name: see `mtjax.value_and_task_grads`.

    Returns:
      Params-shaped, every leaf with a leading task axis.

    Raises:
      ValueError: if `losses_fn` does not return the losses of these tasks.
    """

    def gradient(task, point):
        def loss_of(params):
            losses = losses_fn(params)
            loss_vector(losses, tasks)  # raises if they are of other tasks
            return {task: losses[task]}

        _, grads = value_and_task_grads(loss_of, axis_name=axis_name)(point)
        return grads.combine()

    rows = [gradient(task, point) for task, point in zip(tasks, points)]
    return jax.tree.map(lambda *g: jnp.stack(g), *rows)


def task_gradients_at(
    point: PyTree, losses_fn: LossesFn, grads: TaskGradients, axis_name: str | None
) -> TaskGradients:
    """All tasks' gradients at another point, with the split and factors of `grads`."""
    is_shared = {
        path_name(path): shared
        for path, shared in jax.tree_util.tree_leaves_with_path(grads.shared)
    }
    only_shared = is_shared.__getitem__ if any(is_shared.values()) else None
    grad_fn = value_and_task_grads(losses_fn, shared=only_shared, axis_name=axis_name)
    losses, there = grad_fn(point)
    loss_vector(losses, grads.tasks)
    return there.scale(grads.factors)


def scaled_norm(leaves: Sequence[Array]) -> tuple[Array, Array]:
    """The norm as a product of two factors that neither over- nor underflow."""
    tops = [jnp.max(jnp.abs(x)) for x in leaves if x.size]
    top = jnp.max(jnp.stack(tops)) if tops else jnp.zeros(())
    unit = jnp.where(top == 0, 1.0, top)
    square = sum((jnp.sum((x / unit) ** 2) for x in leaves), start=jnp.zeros(()))
    return unit, jnp.sqrt(jnp.where(top == 0, 1.0, square))
