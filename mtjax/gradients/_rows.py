"""Values of a backward pass that differ between tasks, kept side by side."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


class Rows:
    """One array for each task that reaches a value; it is zero for the other tasks.

    Attributes:
      tasks: indices of the tasks, increasing.
      values: their arrays: a list, or one array with a leading axis.
    """

    def __init__(self, tasks: tuple[int, ...], values: list[Array] | Array):
        """Pairs tasks with their arrays."""
        self.tasks = tasks
        self.values = values

    def of(self, task: int) -> Array:
        """One task's array, zeros if it does not reach the value."""
        if task in self.tasks:
            return self.values[self.tasks.index(task)]
        return jnp.zeros_like(self.values[0])

    def stack(self, tasks: tuple[int, ...]) -> Array:
        """The arrays of some tasks, with a leading axis."""
        if tasks == self.tasks and not isinstance(self.values, list):
            return self.values
        return jnp.stack([self.of(task) for task in tasks])

    def map(self, function: Callable[[Array], Array]) -> "Rows":
        """Applies a linear function to each task's array."""
        if isinstance(self.values, list):
            return Rows(self.tasks, [function(value) for value in self.values])
        return Rows(self.tasks, jax.vmap(function)(self.values))

    def combine(self, weights: Float[Array, " tasks"]) -> Array:
        """Weighted sum over the tasks, in the arrays' type."""
        if not isinstance(self.values, list):
            weights = weights[jnp.array(self.tasks)]
            total = jnp.einsum(
                "k,k...->...",
                weights,
                self.values,
                precision=jax.lax.Precision.HIGHEST,
            )
            return total.astype(self.values.dtype)
        terms = [
            weights[k] * value.astype(jnp.float32)
            for k, value in zip(self.tasks, self.values)
        ]
        return functools.reduce(jnp.add, terms).astype(self.values[0].dtype)


def union(rows: Sequence[Rows]) -> tuple[int, ...]:
    """The tasks that reach any of the values."""
    return tuple(sorted(set().union(*(r.tasks for r in rows))))


def add(first: Rows, second: Rows) -> Rows:
    """The sum, task by task."""
    if first.tasks == second.tasks and not isinstance(first.values, list):
        return Rows(first.tasks, first.values + second.stack(first.tasks))
    tasks = union([first, second])
    terms = [[r.of(k) for r in (first, second) if k in r.tasks] for k in tasks]
    return Rows(tasks, [t[0] + t[1] if len(t) == 2 else t[0] for t in terms])


def lift(
    function: Callable[..., Sequence[Array]], args: Sequence[Any], batch: int | None
) -> list[Rows]:
    """Applies a function that is linear in its rows to each task's arrays.

    Args:
      function: from arrays to a sequence of arrays.
      args: arrays that all tasks share, and rows.
      batch: if given, `function` is batched by `vmap` where so many tasks reach it;
        otherwise it is unrolled.

    Returns:
      Rows for every result.
    """
    tasks = union([a for a in args if isinstance(a, Rows)])
    if len(tasks) == batch:
        axes = [0 if isinstance(a, Rows) else None for a in args]
        arrays = [a.stack(tasks) if isinstance(a, Rows) else a for a in args]
        return [Rows(tasks, r) for r in jax.vmap(function, axes)(*arrays)]
    results = [
        function(*(a.of(k) if isinstance(a, Rows) else a for a in args)) for k in tasks
    ]
    return [Rows(tasks, list(values)) for values in zip(*results)]


jax.tree_util.register_pytree_node(
    Rows, lambda rows: ((rows.values,), rows.tasks), lambda tasks, c: Rows(tasks, c[0])
)
