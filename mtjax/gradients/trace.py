"""Evaluating a `losses_fn` once: losses, their checks, and their pullback."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.gradients._axis import device_local
from mtjax.gradients.split import ParameterSplit, path_name, split_of_pullback

PyTree = Any
LossesFn = Callable[..., Any]
Cotangents = dict[str, jax.Array]  # one scalar per task


class TracedLosses(NamedTuple):
    """What one evaluation of a `losses_fn` gives."""

    losses: dict[str, jax.Array]
    aux: Any
    pullback: Callable[[Cotangents], PyTree]  # to the parameters


def parameter_split(
    losses_fn: LossesFn,
    params: PyTree,
    *args: Any,
    shared: Callable[[str], bool] | None = None,
    has_aux: bool = False,
    **kwargs: Any,
) -> ParameterSplit:
    """Finds which task's loss reaches which parameter, without running the model.

    Args:
      losses_fn: `losses_fn(params, *args, **kwargs) -> {task: loss}`.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`).
      *args: passed on to `losses_fn` (arrays or their shapes).
      shared: overrides the inferred split, see `mtjax.value_and_task_grads`.
      has_aux: whether `losses_fn` returns `(losses, aux)`.
      **kwargs: passed on to `losses_fn`.

    Returns:
      The split: print it with `.describe(params)`, label leaves for
      `optax.multi_transform` with `.labels()`.

    Raises:
      TypeError: if a parameter is not of a floating-point type, or if `losses_fn` does
        not return a dictionary from task names to scalars.
      ValueError: if `losses_fn` returns no loss, or `shared` selects no parameter.
    """

    def trace(params, args, kwargs):
        traced = trace_losses(losses_fn, params, args, kwargs, has_aux)
        return split_of_pullback(traced.pullback, traced.losses, params, shared)

    check_params(params)
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params
    )
    return with_abstract_arguments(trace, abstract, args, kwargs)


def trace_losses(
    losses_fn: LossesFn,
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    has_aux: bool,
    axis_name: str | None = None,
) -> TracedLosses:
    """Evaluates the losses once and checks them.

    Raises:
      TypeError, ValueError: as `parameter_split` states.
    """
    losses, pullback, aux = jax.vjp(
        lambda p: checked_losses(losses_fn(p, *args, **kwargs), has_aux, axis_name),
        params,
        has_aux=True,
    )
    return TracedLosses(losses, aux, lambda cotangents: pullback(cotangents)[0])


def with_abstract_arguments(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function(*args)` with tracers in place of `ShapeDtypeStruct`s.

    All other arguments are passed as they are, so that flags stay Python values.
    """
    leaves, structure = jax.tree.flatten(args)
    where = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]
    results = []

    def call(tracers):
        filled = list(leaves)
        for i, tracer in zip(where, tracers):
            filled[i] = tracer
        results.append(function(*structure.unflatten(filled)))

    jax.eval_shape(call, [leaves[i] for i in where])
    return results[0]


def check_params(params: PyTree) -> None:
    """Raises if a parameter cannot be differentiated, or there is none."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("`params` must hold at least one array, got an empty tree.")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            continue
        remedy = (
            "hold real and imaginary parts as two arrays"
            if jnp.issubdtype(dtype, jnp.complexfloating)
            else "pass counters and tables as further arguments of `losses_fn`, or "
            "close over them"
        )
        raise TypeError(
            "`params` must hold floating-point arrays, got "
            f"{dtype} at '{path_name(path)}'; {remedy}."
        )


def checked_losses(
    result: Any, has_aux: bool, axis_name: str | None
) -> tuple[dict[str, jax.Array], Any]:
    """Checks what a `losses_fn` returned; losses come back in the order of the tasks.

    Raises:
      TypeError, ValueError: as `parameter_split` states.
    """
    aux = None
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                "With `has_aux=True`, `losses_fn` must return (losses, aux), got "
                f"{type(result).__name__}."
            )
        result, aux = result
    if not isinstance(result, Mapping):
        hint = (
            "; pass `has_aux=True` if it returns (losses, aux)"
            if isinstance(result, tuple)
            else ""
        )
        raise TypeError(
            "`losses_fn` must return a dictionary from task names to scalar losses, "
            f"got {type(result).__name__}{hint}."
        )
    if not result:
        raise ValueError(
            "`losses_fn` must return at least one loss, got an empty dictionary."
        )
    for task, loss in result.items():
        _check_loss(task, loss)
    losses = {task: jnp.asarray(result[task]) for task in sorted(result)}
    return device_local(losses, axis_name), aux


def _check_loss(task: Any, loss: Any) -> None:
    if not isinstance(task, str):
        raise TypeError(
            "`losses_fn` must name tasks by strings, got the key "
            f"{task!r} of type {type(task).__name__}."
        )
    is_array = hasattr(loss, "shape") and hasattr(loss, "dtype")
    if not (is_array or isinstance(loss, int | float)) or jnp.shape(loss) != ():
        found = f"shape {loss.shape}" if is_array else type(loss).__name__
        raise TypeError(
            f"`losses_fn` must return one scalar per task, got {found} for "
            f"'{task}'; take its mean over the batch (`mtjax.losses.masked_mean` "
            "if labels are missing)."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            "`losses_fn` must return floating-point losses, got "
            f"{jnp.result_type(loss)} for '{task}'."
        )
