"""The `ghost` engine: inner products of gradients that are never formed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Float

from mtjax.gradients._products import Product, carried_out
from mtjax.gradients._rows import Rows
from mtjax.gradients._walk import walk
from mtjax.gradients.gramian import gramian_of_pairs
from mtjax.gradients.stacked import StackedEngine, unroll_pullbacks

PyTree = Any


class GhostEngine(StackedEngine):
    r"""The Gramian from layer inputs and from the tasks' cotangents of layer outputs.

    For a layer :math:`y = x W` the gradient of task :math:`i` is :math:`x^\top
    \delta_i`, and :math:`\langle x^\top \delta_i, x^\top \delta_j \rangle = \langle
    \delta_i, x x^\top \delta_j \rangle`: with few examples and positions less work than
    the gradients, and less memory. Parameter by parameter the cheaper way is taken.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes what `StackedEngine` takes."""
        super().__init__(*args, **kwargs)
        self.name = "ghost"
        self._walked: tuple[Any, list[Any]] | None = None

    def gramian(self) -> Float[Array, "tasks tasks"]:
        """Inner products of the tasks' gradients, float32."""
        num_tasks, axis_name = len(self._dtypes), self._axis_name
        gather = None
        if axis_name is not None:
            gather = lambda x: jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
        whole, parts = [], []
        for value, is_shared in zip(
            self._gradients, jax.tree.leaves(self._split.shared)
        ):
            if not is_shared:
                continue
            if isinstance(value, Product) and value.is_better_kept(num_tasks):
                parts += value.factors(gather)
            elif isinstance(value, Product | Rows):
                rows = carried_out(value).map(self._average)
                whole.append((rows, rows))
        if axis_name is None:
            return gramian_of_pairs(whole + parts, num_tasks)
        devices = jax.lax.axis_size(axis_name)
        across = jax.lax.psum(gramian_of_pairs(parts, num_tasks), axis_name)
        return gramian_of_pairs(whole, num_tasks) + across / devices**2

    def pull(self, weights: Float[Array, " tasks"]) -> PyTree:
        """Params-shaped sum of the tasks' gradients with the given weights."""
        if self._walked is None or self._walked[0] != _current_trace():
            return super().pull(weights)
        # The cotangents of all tasks are there: no further backward pass.
        total = [
            g.combine(weights) if isinstance(g, Product | Rows) else g
            for g in self._gradients
        ]
        return self._average(
            jax.tree.unflatten(jax.tree.structure(self._split.shared), total)
        )

    @property
    def _gradients(self) -> list[Any]:
        """Per leaf the tasks' gradients: rows, products, or an array of zeros."""
        # What was found inside a branch or a loop does not exist outside of it.
        if self._walked is None or self._walked[0] != _current_trace():
            self._walked = (_current_trace(), self._walk())
        return self._walked[1]

    def _walk(self) -> list[Any]:
        num_tasks = len(self._dtypes)
        ones = self._cotangents(jnp.ones(num_tasks))
        closed = jax.make_jaxpr(lambda c: jax.tree.leaves(self._pullback(c)))(ones)
        args = [Rows((k,), [one]) for k, one in enumerate(ones.values())]
        batch = None if unroll_pullbacks(num_tasks) else num_tasks
        return walk(closed.jaxpr, closed.consts, args, batch)


def _current_trace() -> Any:
    return get_opaque_trace_state(convention="nnx")
