"""What a training step will cost, from the compiler's own analysis."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mtjax.gradients.representation import compose
from mtjax.gradients.trace import parameter_split
from mtjax.gradients.value_and_task_grads import value_and_task_grads

PyTree = Any


class CostRow(NamedTuple):
    """Cost of one kind of step.

    Attributes:
      step: what is computed.
      engine: by which engine.
      flops: floating-point operations of one step.
      temporary_bytes: peak memory beside parameters, batch and update.
    """

    step: str
    engine: str
    flops: float
    temporary_bytes: int


class CostReport(NamedTuple):
    """Costs of the plain sum of losses and of what balancers compute; print it."""

    rows: tuple[CostRow, ...]

    def __str__(self) -> str:
        """Renders a table, with ratios to the plain sum of losses."""
        first = self.rows[0]
        table = [("step", "engine", "GFLOP", "ratio", "temporary MB", "ratio")]
        for row in self.rows:
            table.append(
                (
                    row.step,
                    row.engine,
                    f"{row.flops / 1e9:.3f}",
                    f"{row.flops / max(first.flops, 1.0):.2f}",
                    f"{row.temporary_bytes / 1e6:.2f}",
                    f"{row.temporary_bytes / max(first.temporary_bytes, 1):.2f}",
                )
            )
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in table
        )


def cost_report(
    losses_fn: Callable[..., Any] | tuple[Callable[..., Any], Callable[..., Any]],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> CostReport:
    """Compiles the steps that balancers take and reads off bytes and FLOPs.

    Nothing is run: shapes (`jax.ShapeDtypeStruct`) do as well as arrays.

    Args:
      losses_fn: as for `mtjax.value_and_task_grads`; the pair
        `(encode, losses_from_representation)` adds the representation engine.
      params: the parameters.
      *args: the batch and whatever else `losses_fn` takes.
      has_aux: whether `losses_fn` returns `(losses, aux)`.
      **kwargs: keyword arguments of `losses_fn`.

    Returns:
      The report: "sum of losses" is ordinary training, "combine" what loss weightings
      compute, "gramian + combine" what methods on the Gramian compute, "stack" what
      element-wise methods compute.

    Raises:
      TypeError, ValueError: as `mtjax.value_and_task_grads`.
    """
    is_pair = isinstance(losses_fn, tuple)
    engines = ["stacked", "ghost", *["representation"] * is_pair]
    whole = compose(*losses_fn) if isinstance(losses_fn, tuple) else losses_fn
    parameter_split(whole, params, *args, has_aux=has_aux, **kwargs)

    def sum_of_losses(params, *args, **kwargs):
        result = whole(params, *args, **kwargs)
        return sum((result[0] if has_aux else result).values())

    def view(engine, read):
        grad_fn = value_and_task_grads(losses_fn, engine=engine, has_aux=has_aux)
        return lambda params, *a, **k: read(grad_fn(params, *a, **k)[1])

    steps = [("sum of losses", "jax.grad", jax.grad(sum_of_losses))]
    steps += [("combine", "stacked", view("stacked", lambda g: g.combine()))]
    steps += [
        ("gramian + combine", e, view(e, lambda g: g.combine(g.gramian().sum(0))))
        for e in engines
    ]
    steps += [("stack", "stacked", view("stacked", lambda g: g.stack()))]
    return CostReport(tuple(_measure(*step, params, args, kwargs) for step in steps))


def _measure(step, engine, function, params, args, kwargs) -> CostRow:
    leaves, structure = jax.tree.flatten((params, args, kwargs))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def on_arrays(arrays):
        arrays = iter(arrays)
        filled = [next(arrays) if a else x for a, x in zip(is_array, leaves)]
        params, args, kwargs = structure.unflatten(filled)
        return function(params, *args, **kwargs)

    arrays = [x for a, x in zip(is_array, leaves) if a]
    compiled = jax.jit(on_arrays).lower(arrays).compile()
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return CostRow(
        step=step,
        engine=engine,
        flops=float(costs.get("flops", math.nan)) if costs else math.nan,
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
    )
