"""A loop of a backward pass, for all tasks at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Jaxpr

from mtjax.gradients._products import Product, Term, carried_out
from mtjax.gradients._reach import scan_parts, settle
from mtjax.gradients._rows import Rows

# An array that all tasks share, the tasks' arrays, or a product that stands for them.
Value = Any


def through_scan(
    eqn: Any, inputs: list[Value], batch: int | None, walk: Callable[..., list[Value]]
) -> list[Value]:
    """Results of a `scan` whose inputs differ between tasks.

    Products that the body makes leave the loop as products: what is scanned out gets a
    batch axis, and what is summed over the loop is summed by one contraction.

    Args:
      eqn: the equation.
      inputs: constants, initial carry and what is scanned over.
      batch: as for `_rows.lift`.
      walk: evaluates the body.

    Returns:
      Final carry and what is scanned out.
    """
    params, body = eqn.params, eqn.params["jaxpr"]
    first, stop = scan_parts(eqn, body.jaxpr)
    inputs = [carried_out(value) for value in inputs]
    tasks = _tasks_of_carry(body.jaxpr, inputs, slice(first, stop))
    consts, xs = inputs[:first], _turned(inputs[stop:])
    # A sum that starts at zero is the only carry that is linear and not yet the tasks'.
    is_sum = [
        bool(t) and not isinstance(c, Rows) and _is_only_added_to(body.jaxpr, first, i)
        for i, (c, t) in enumerate(zip(inputs[first:stop], tasks))
    ]
    carry = [_with_tasks(c, t, batch) for c, t in zip(inputs[first:stop], tasks)]

    def evaluate(carry, xs):
        results = walk(body.jaxpr, body.consts, [*consts, *carry, *xs], batch)
        return results[: len(carry)], results[len(carry) :]

    def find_products(carry, xs):
        ends, _ = evaluate(
            [Rows((), []) if s else c for c, s in zip(carry, is_sum)], xs
        )
        stays[:] = [not (s and isinstance(e, Product)) for e, s in zip(ends, is_sum)]

    def step(carry, xs):
        rest = iter(carry)
        ends, ys = evaluate([next(rest) if s else Rows((), []) for s in stays], xs)
        products[:] = [None if s else e for e, s in zip(ends, stays)]
        products.extend(y if _may_leave(y) else None for y in ys)
        sources[:] = [[_index(t.shared, xs) for t in _terms(p)] for p in products]
        ends = [_with_tasks(e, t, batch) for e, t, s in zip(ends, tasks, stays) if s]
        ys = [None if _may_leave(y) else carried_out(y) for y in ys]
        return ends, (ys, [_factors(p, s) for p, s in zip(products, sources)])

    stays: list[bool] = []
    products: list[Product | None] = []
    sources: list[list[int | None]] = []
    jax.eval_shape(find_products, carry, jax.tree.map(lambda x: x[0], xs))
    ends, (ys, factors) = jax.lax.scan(
        step,
        [c for c, s in zip(carry, stays) if s],
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    rest, results = iter(ends), []
    for i, (product, found) in enumerate(zip(products, _turned(factors))):
        is_end = i < len(carry)
        if product is None:
            results.append(next(rest) if is_end else _turned(ys[i - len(carry)]))
            continue
        leave = _summed if is_end else _scanned_out
        terms = [
            leave(term, xs[source] if shared is None else shared, rows)
            for term, source, (shared, rows) in zip(product.terms, sources[i], found)
        ]
        moves = product.moves if is_end else tuple(map(jax.vmap, product.moves))
        results.append(Product(tuple(terms), batch, moves))
    return results


def _summed(term: Term, shared: Array, rows: Rows) -> Term:
    """The sum over the loop of what `term` was in one turn."""
    b, n, p, q = term.sizes

    def matrices(turn):
        def all_turns(x):
            x = jnp.moveaxis(jax.vmap(turn)(x), 0, 1)  # (b, turns, n, …)
            return x.reshape(x.shape[0], -1, *x.shape[3:])

        return all_turns

    def carry_out(shared, delta):
        one = jax.eval_shape(term.carry_out, shared[0], delta[0])
        add = lambda total, turn: (total + term.carry_out(*turn), None)
        return jax.lax.scan(add, jnp.zeros(one.shape, one.dtype), (shared, delta))[0]

    return dataclasses.replace(
        term,
        carry_out=carry_out,
        shared=shared,
        rows=rows,
        known=matrices(term.known),
        delta=matrices(term.delta),
        sizes=(b, n * shared.shape[0], p, q),
    )


def _scanned_out(term: Term, shared: Array, rows: Rows) -> Term:
    """What `term` was in each turn, on a new first axis."""
    b, n, p, q = term.sizes

    def matrices(turn):
        def all_turns(x):
            x = jax.vmap(turn)(x)
            return x.reshape(-1, *x.shape[2:])

        return all_turns

    return dataclasses.replace(
        term,
        carry_out=jax.vmap(term.carry_out),
        shared=shared,
        rows=rows,
        known=matrices(term.known),
        delta=matrices(term.delta),
        known_axes=tuple(axis + 1 for axis in term.known_axes),
        row_axes=tuple(axis + 1 for axis in term.row_axes),
        sizes=(b * shared.shape[0], n, p, q),
    )


def _tasks_of_carry(
    body: Jaxpr, inputs: list[Value], carry: slice
) -> list[tuple[int, ...]]:
    """The tasks that reach each part of the carry sooner or later."""
    sets = [sum(1 << k for k in v.tasks) if isinstance(v, Rows) else 0 for v in inputs]
    reached = settle(body, sets, carry)[: carry.stop - carry.start]
    return [tuple(k for k in range(s.bit_length()) if s >> k & 1) for s in reached]


def _is_only_added_to(body: Jaxpr, first: int, index: int) -> bool:
    """Whether the body uses a part of the carry for nothing but to add to it."""
    carry, end = body.invars[first + index], body.outvars[index]
    users = [eqn for eqn in body.eqns if any(v is carry for v in eqn.invars)]
    return (
        len(users) == 1
        and users[0].primitive.name in ("add", "add_any")
        and users[0].outvars[0] is end
        and not any(v is carry for v in body.outvars)
    )


def _with_tasks(value: Value, tasks: tuple[int, ...], batch: int | None) -> Value:
    """The value with an array for exactly these tasks."""
    if not tasks:
        return value
    value = carried_out(value)
    if not isinstance(value, Rows):  # zero, or it would not be linear
        value = Rows(tasks, [value] * len(tasks))
    if len(tasks) == batch:
        return Rows(tasks, value.stack(tasks))
    return Rows(tasks, [value.of(k) for k in tasks])


def _turned(tree: Any) -> Any:
    """Swaps the axes of tasks and turns, where tasks are stacked."""

    def turn(value):
        if isinstance(value, Rows) and not isinstance(value.values, list):
            return Rows(value.tasks, value.values.swapaxes(0, 1))
        return value

    return jax.tree.map(turn, tree, is_leaf=lambda x: isinstance(x, Rows))


def _may_leave(value: Value) -> bool:
    # Indices have no batch axis to put the turns on.
    return isinstance(value, Product) and not any(t.is_lookup for t in value.terms)


def _terms(product: Product | None) -> tuple[Term, ...]:
    return () if product is None else product.terms


def _index(shared: Array, xs: list[Value]) -> int | None:
    """Where an array is scanned over already, so that it need not be kept twice."""
    return next((i for i, x in enumerate(xs) if x is shared), None)


def _factors(product: Product | None, sources: list[int | None]):
    return [
        (t.shared if source is None else None, t.rows)
        for t, source in zip(_terms(product), sources)
    ]
