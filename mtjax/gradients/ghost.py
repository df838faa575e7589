"""The `ghost` engine: inner products of gradients that are never formed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Float

from mtjax.gradients._axis import device_local
from mtjax.gradients._products import Product, carried_out
from mtjax.gradients._rows import Rows
from mtjax.gradients._walk import walk
from mtjax.gradients.gramian import gramian_of_pairs
from mtjax.gradients.stacked import StackedEngine, unroll_pullbacks

PyTree = Any

# Of the multiplications of weight gradients and their inner products, what must be
# saved for this engine to be chosen: where little is, it needs more memory for nothing.
_WORTH_IT = 0.25


class GhostEngine(StackedEngine):
    r"""The Gramian from layer inputs and from the tasks' cotangents of layer outputs.

    For a layer :math:`y = x W` the gradient of task :math:`i` is :math:`x^\top
    \delta_i`, and :math:`\langle x^\top \delta_i, x^\top \delta_j \rangle = \langle
    \delta_i, x x^\top \delta_j \rangle`: with few examples and positions less work than
    the gradients, and less memory. Parameter by parameter the way is taken that needs
    fewer multiplications. After the Gramian, an update needs no further backward pass.
    """

    def __init__(self, *args: Any, always: bool = True, **kwargs: Any):
        """Takes what `StackedEngine` takes.

        Args:
          *args: positional arguments of `StackedEngine`.
          always: if not, be the stacked engine where little would be saved.
          **kwargs: its keyword arguments.
        """
        super().__init__(*args, **kwargs)
        self.name = "ghost" if always else "auto"
        self._always = always
        self._walked: tuple[Any, list[Any]] | None = None

    def gramian(self) -> Float[Array, "tasks tasks"]:
        """Inner products of the tasks' gradients, float32."""
        num_tasks, axis_name = len(self._dtypes), self._axis_name
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        gradients = self._walk()
        shared = [
            g for g, s in zip(gradients, jax.tree.leaves(self._split.shared)) if s
        ]
        costs = [
            g.operations(num_tasks, devices) for g in shared if isinstance(g, Product)
        ]
        saved = sum(max(direct - kept, 0) for direct, kept in costs)
        if not self._always and saved <= _WORTH_IT * sum(d for d, _ in costs):
            return super().gramian()
        # What was found inside a branch or a loop does not exist outside of it.
        self._walked = (_current_trace(), gradients)
        whole, parts = [], []
        for gradient in shared:
            if isinstance(gradient, Product):
                direct, kept = gradient.operations(num_tasks, devices)
                if kept < direct:
                    parts += gradient.factors(
                        None if axis_name is None else self._gather
                    )
                    continue
            if isinstance(gradient, Product | Rows):
                rows = carried_out(gradient).map(self._average)
                whole.append((rows, rows))
        if axis_name is None:
            return gramian_of_pairs(whole + parts, num_tasks)
        across = jax.lax.psum(gramian_of_pairs(parts, num_tasks), axis_name)
        return gramian_of_pairs(whole, num_tasks) + across / devices**2

    def pull(self, weights: Float[Array, " tasks"]) -> PyTree:
        """Params-shaped sum of the tasks' gradients with the given weights."""
        if self._walked is None or self._walked[0] != _current_trace():
            return super().pull(weights)
        total = [
            g.combine(weights) if isinstance(g, Product | Rows) else g
            for g in self._walked[1]
        ]
        structure = jax.tree.structure(self._split.shared)
        return self._average(structure.unflatten(total))

    def _walk(self) -> list[Any]:
        """Per leaf the tasks' gradients: rows, products, or an array of zeros."""
        num_tasks = len(self._dtypes)
        ones = self._cotangents(jnp.ones(num_tasks))
        closed = jax.make_jaxpr(lambda c: jax.tree.leaves(self._pullback(c)))(ones)
        args = [Rows((k,), [one]) for k, one in enumerate(ones.values())]
        batch = None if unroll_pullbacks(num_tasks) else num_tasks
        return walk(closed.jaxpr, closed.consts, args, batch)

    def _gather(self, x: Array) -> Array:
        x = device_local(x, self._axis_name)
        return jax.lax.all_gather(x, self._axis_name, axis=1, tiled=True)


def _current_trace() -> Any:
    return get_opaque_trace_state(convention="nnx")
