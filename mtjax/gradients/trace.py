"""Tracing a `losses_fn` once: task names, checks, and the parameter split."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from mtjax.gradients.split import ParameterSplit, path_name, split_of_jaxpr

PyTree = Any


class TracedLosses(NamedTuple):
    """A `losses_fn` with its batch bound, as a program on parameter leaves."""

    split: ParameterSplit
    program: Callable[..., tuple[list[jax.Array], Any]]  # leaves -> losses, aux


def parameter_split(
    losses_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    shared: Callable[[str], bool] | None = None,
    has_aux: bool = False,
    **kwargs: Any,
) -> ParameterSplit:
    """Finds which task's loss reaches which parameter, without computing anything.

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
      TypeError: if a parameter is not of a floating-point or complex type, or if
        `losses_fn` does not return a dictionary from task names to scalars.
      ValueError: if `losses_fn` returns no loss, or `shared` selects no parameter.
    """

    def trace(args, kwargs):
        return trace_losses(losses_fn, params, args, kwargs, shared, has_aux).split

    return with_abstract_arguments(trace, args, kwargs)


def trace_losses(
    losses_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shared: Callable[[str], bool] | None,
    has_aux: bool,
) -> TracedLosses:
    """Traces the losses once, checks them, and splits the parameters.

    Raises:
      TypeError, ValueError: as `parameter_split` states.
    """
    _check_params(params)
    closed, shape = jax.make_jaxpr(
        lambda p: losses_fn(p, *args, **kwargs), return_shape=True
    )(params)
    losses, aux = _check_result(shape, has_aux)
    tasks = tuple(sorted(losses))
    split = split_of_jaxpr(closed.jaxpr, tasks, params, shared)
    evaluate = jaxpr_as_fun(closed)
    aux_structure = jax.tree.structure(aux)

    def program(*leaves: jax.Array) -> tuple[list[jax.Array], Any]:
        # Dictionaries are flattened in the order of their sorted keys.
        flat = evaluate(*leaves)
        return flat[: len(tasks)], aux_structure.unflatten(flat[len(tasks) :])

    return TracedLosses(split, program)


def with_abstract_arguments(
    function: Callable[[tuple, dict], Any], args: tuple, kwargs: Mapping[str, Any]
) -> Any:
    """Calls `function(args, kwargs)` with tracers in place of `ShapeDtypeStruct`s.

    All other arguments are passed as they are, so that flags stay Python values.
    """
    leaves, structure = jax.tree.flatten((args, dict(kwargs)))
    where = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]
    results = []

    def call(tracers):
        filled = list(leaves)
        for i, tracer in zip(where, tracers):
            filled[i] = tracer
        results.append(function(*structure.unflatten(filled)))

    jax.eval_shape(call, [leaves[i] for i in where])
    return results[0]


def _check_params(params: PyTree) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("`params` must hold at least one array, got an empty tree.")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                "`params` must hold floating-point or complex arrays, got "
                f"{dtype} at '{path_name(path)}'; pass counters and tables as "
                "further arguments of `losses_fn`, or close over them."
            )


def _check_result(result: Any, has_aux: bool) -> tuple[Mapping[str, Any], Any]:
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
            "`losses_fn` must return at least one loss, got an empty dict."
        )
    for task, loss in result.items():
        if not isinstance(task, str):
            raise TypeError(
                "`losses_fn` must name tasks by strings, got the key "
                f"{task!r} of type {type(task).__name__}."
            )
        shape = getattr(loss, "shape", None)
        if shape != ():
            found = f"shape {shape}" if shape is not None else type(loss).__name__
            raise TypeError(
                f"`losses_fn` must return one scalar per task, got {found} for "
                f"'{task}'; take its mean over the batch (`mtjax.losses.masked_mean` "
                "if labels are missing)."
            )
        if not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(
                "`losses_fn` must return floating-point losses, got "
                f"{loss.dtype} for '{task}'."
            )
    return result, aux
