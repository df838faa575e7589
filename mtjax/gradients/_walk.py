"""One walk through a backward pass for all tasks at once.

Every equation is looked at once, with the values of all tasks side by side: what does
not depend on the task is computed once, what a task does not reach is not computed for
it, and gradients of weights come out as products that are not carried out yet.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mtjax.gradients._products import Product, carried_out
from mtjax.gradients._rows import Rows, add, lift
from mtjax.gradients._scan import through_scan
from mtjax.gradients._terms import term_of

# An array that all tasks share, the tasks' arrays, or a product that stands for them.
Value = Any

_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def walk(
    jaxpr: Jaxpr, consts: Sequence[Value], args: Sequence[Value], batch: int | None
) -> list[Value]:
    """Evaluates a function that is linear in the tasks' values.

    Args:
      jaxpr: the function.
      consts: its constants.
      args: its arguments.
      batch: as for `_rows.lift`.

    Returns:
      Its results.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

    def read(atom) -> Value:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        with eqn.ctx.manager:
            values.update(zip(eqn.outvars, _through(eqn, inputs, batch)))
    return [read(v) for v in jaxpr.outvars]


def of_tasks(value: Value) -> bool:
    """Whether a value differs between tasks."""
    return isinstance(value, Rows | Product)


def _through(eqn: Any, inputs: list[Value], batch: int | None) -> Sequence[Value]:
    name = eqn.primitive.name
    if not any(map(of_tasks, inputs)):
        return _bind(eqn, inputs)
    if name == "scan":
        return through_scan(eqn, inputs, batch, walk)
    if "prevent_cse" in eqn.params:
        return _through_remat(eqn, inputs, batch)
    if name in _CALLS:
        jaxpr = next(p for p in eqn.params.values() if isinstance(p, ClosedJaxpr))
        return walk(jaxpr.jaxpr, jaxpr.consts, inputs, batch)
    if name in ("add", "add_any") and all(map(of_tasks, inputs)):
        return [_add(*inputs)]
    if isinstance(inputs[0], Product) and len(inputs) == 1:
        if name == "transpose":
            return [inputs[0].transposed(eqn.params["permutation"])]
        if name in ("reshape", "squeeze", "convert_element_type", "copy"):
            return [inputs[0].moved(lambda x: _bind(eqn, [x])[0])]
    inputs = [carried_out(value) for value in inputs]
    term = term_of(eqn, inputs)
    if term is not None:
        return [Product((term,), batch)]
    return lift(lambda *arrays: _bind(eqn, arrays), inputs, batch)


def _through_remat(eqn: Any, inputs: list[Value], batch: int | None) -> list[Value]:
    inputs = [carried_out(value) for value in inputs]
    if eqn.params["prevent_cse"]:
        # What is computed again, once for all tasks, must wait until the tasks' values
        # are there, or it would be kept from the forward pass after all.
        inputs = jax.lax.optimization_barrier(inputs)
    body = eqn.params["jaxpr"]
    if isinstance(body, ClosedJaxpr):
        return walk(body.jaxpr, body.consts, inputs, batch)
    return walk(body, (), inputs, batch)


def _add(first: Value, second: Value) -> Value:
    if isinstance(first, Product) and isinstance(second, Product):
        total = first.plus(second)
        if total is not None:
            return total
    # The sum that a loop starts from has no tasks yet.
    for one, other in ((first, second), (second, first)):
        if isinstance(one, Rows) and not one.tasks:
            return other
    return add(carried_out(first), carried_out(second))


def _bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    results = eqn.primitive.bind(*inputs, **params)
    return results if eqn.primitive.multiple_results else [results]
