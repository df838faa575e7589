"""From a function of per-task losses to its gradients per task."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from mtjax.gradients._axis import device_local
from mtjax.gradients.ghost import GhostEngine
from mtjax.gradients.representation import compose, trace_at_representation
from mtjax.gradients.split import split_of_pullback
from mtjax.gradients.stacked import StackedEngine
from mtjax.gradients.task_gradients import TaskGradients
from mtjax.gradients.trace import LossesFn, check_params, trace_losses

EngineName = Literal["auto", "stacked", "ghost", "representation"]


def value_and_task_grads(
    losses_fn: LossesFn | tuple[Callable[..., Any], LossesFn],
    *,
    shared: Callable[[str], bool] | None = None,
    engine: EngineName | str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., tuple[Any, TaskGradients]]:
    """Like `jax.value_and_grad`, for a dictionary of losses, one per task.

    Args:
      losses_fn: `losses_fn(params, *args, **kwargs) -> {task: scalar loss}`. The
        arguments are free: one batch with masks, a dictionary of per-task batches, a
        key. For the representation engine a pair `(encode, losses_from_representation)`
        with `encode(params, *args) -> z` and
        `losses_from_representation(params, z, *args) -> {task: loss}`.
      shared: which parameters to balance, as a predicate on the leaf's path
        (`"encoder/dense_0/kernel"`). None infers it: a leaf is shared if two or more
        losses reach it. A leaf that is declared not shared follows the plain sum of
        the gradients of the tasks that reach it; with a single task nothing is shared.
      engine: how per-task gradients are computed. "stacked" and "ghost" are exact and
        give the same numbers: the first runs one backward pass per task, the second
        finds the Gramian without forming any task's weight gradients where that takes
        fewer operations (layer by layer: dense layers, convolutions, embeddings; few
        examples and positions, many parameters), and keeps the cotangents of all tasks
        for the update. "representation" takes the Gramian of the gradients at the
        shared representation `z` instead of the shared parameters: a different,
        cheaper method (the -UB variants), not an approximation of the same numbers.
        "auto" is "representation" for a pair; otherwise "ghost" where it saves a fourth
        of the operations of weight gradients and "stacked" where it does not.
      has_aux: whether `losses_fn` returns `(losses, aux)`.
      axis_name: inside `shard_map` or `pmap`, the axis over which the batch is split:
        losses and per-task gradients are averaged over it before anything else, so
        every device computes the same update as one device with the whole batch; aux
        stays each device's own. The representation `z` must then hold the device's own
        examples. Not needed under plain `jit` with sharded arrays.

    Returns:
      A function of `(params, *args, **kwargs)` that returns `(losses, grads)`, or
      `((losses, aux), grads)`: the losses as returned, `grads` a `TaskGradients`.

    Raises:
      TypeError: if parameters are not floating-point, or `losses_fn` does not return a
        dictionary of floating-point scalars.
      ValueError: if there are no losses, no parameters, or an unknown `engine`.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> def losses_fn(params, x):
      ...     return {"left": jnp.sum((params - x) ** 2), "up": jnp.sum(params * x)}
      >>> grad_fn = mtjax.value_and_task_grads(losses_fn)
      >>> losses, grads = grad_fn(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
      >>> grads.tasks
      ('left', 'up')
      >>> print(grads.gramian())
      [[8. 2.]
       [2. 1.]]
      >>> print(grads.combine(jnp.array([0.5, 1.0])))
      [1. 2.]
    """
    is_pair = isinstance(losses_fn, tuple)
    if engine not in get_args(EngineName):
        raise ValueError(
            f"`engine` must be one of {get_args(EngineName)}, got {engine!r}."
        )
    if engine == "representation" and not is_pair:
        raise ValueError(
            "`engine='representation'` needs `losses_fn` to be a pair "
            "(encode, losses_from_representation), got a single function."
        )
    whole = compose(*losses_fn) if isinstance(losses_fn, tuple) else losses_fn

    def grad_fn(params, *args, **kwargs):
        check_params(params)
        params = device_local(params, axis_name)
        pull_representation = None
        if is_pair and engine in ("auto", "representation"):
            traced, pull_representation = trace_at_representation(
                losses_fn, params, args, kwargs, has_aux, axis_name
            )
        else:
            traced = trace_losses(whole, params, args, kwargs, has_aux, axis_name)
        losses, aux, pullback = traced
        split = split_of_pullback(pullback, losses, params, shared)
        parts = (losses, pullback, split, axis_name)
        if pull_representation is not None:
            chosen = StackedEngine(*parts, pull_representation)
        elif engine == "stacked":
            chosen = StackedEngine(*parts)
        else:
            chosen = GhostEngine(*parts, always=engine == "ghost")
        grads = TaskGradients(split, chosen)
        if axis_name is not None:
            losses = jax.lax.pmean(losses, axis_name)
        return ((losses, aux) if has_aux else losses), grads

    return grad_fn
