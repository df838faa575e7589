"""The `stacked` engine: one pullback per task, unrolled or batched by `vmap`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.gradients._axis import device_local
from mtjax.gradients._rows import Rows
from mtjax.gradients.gramian import gramian_of_pairs
from mtjax.gradients.split import ParameterSplit
from mtjax.gradients.trace import Cotangents

PyTree = Any

# Measured by experiments/benchmarks/pullbacks.py on two CPU cores: batched backward
# passes take 1.1 to 2.3 times as long as separate ones, for 2 to 32 tasks, MLP and
# convolutions (at 32: 270 ms to 173 ms, 619 ms to 287 ms). What separate ones take
# longer to compile is won back within 50 steps up to here (at 16: 0.8 s and 3 s, at 32:
# 4 s and 15 s), but it grows faster than the number of tasks.
_MAX_UNROLLED_ON_CPU = 32


class StackedEngine:
    """Per-task gradients as rows of a Jacobian, averaged over devices if asked."""

    def __init__(
        self,
        losses: Mapping[str, Array],
        pullback: Callable[[Cotangents], PyTree],
        split: ParameterSplit,
        axis_name: str | None = None,
        pull_representation: Callable[[Cotangents], PyTree] | None = None,
    ):
        """Wraps a pullback.

        Args:
          losses: the losses, of which only the types are used.
          pullback: maps one cotangent per loss to the gradient of the parameters.
          split: the parameter split.
          axis_name: mesh or `pmap` axis to average gradients over.
          pull_representation: maps one cotangent per loss to the gradient at a shared
            representation, of which the Gramian is taken instead, if given.
        """
        self.name = "stacked" if pull_representation is None else "representation"
        self._dtypes = {task: loss.dtype for task, loss in losses.items()}
        self._pullback = pullback
        self._split = split
        self._axis_name = axis_name
        self._pull_representation = pull_representation

    def pull(self, weights: Float[Array, " tasks"]) -> PyTree:
        """Params-shaped sum of the tasks' gradients with the given weights."""
        return self._average(self._pullback(self._cotangents(weights)))

    def stack(self) -> PyTree:
        """Params-shaped, every leaf with a leading task axis."""
        return self._average(self._rows(self._pullback))

    def gramian(self) -> Float[Array, "tasks tasks"]:
        """Inner products of the tasks' gradients, float32."""
        if self._pull_representation is None:
            return self._gramian(lambda c: self._average(self._pull_shared(c)))
        gramian = self._gramian(self._pull_representation)
        if self._axis_name is None:
            return gramian
        # Each device holds its part of the batch, whose mean loss counts 1/n: the
        # inner products add up over devices.
        devices = jax.lax.axis_size(self._axis_name)
        return jax.lax.pmean(gramian, self._axis_name) / devices

    def inner(self, direction: PyTree) -> Float[Array, " tasks"]:
        """Inner products of the tasks' gradients with a direction, float32."""
        cotangents = self._cotangents(jnp.zeros(len(self._dtypes)))
        direction = jax.tree.map(
            lambda d, g: d.astype(g.dtype),
            device_local(direction, self._axis_name),
            jax.eval_shape(self._pullback, cotangents),
        )
        # The pullback is linear: its transpose pushes a direction forward.
        (slopes,) = jax.linear_transpose(self._pullback, cotangents)(direction)
        slopes = jnp.stack([slopes[task].astype(jnp.float32) for task in self._dtypes])
        return self._average(slopes)

    def _pull_shared(self, cotangents: Cotangents) -> list[Array]:
        grads = jax.tree.leaves(self._pullback(cotangents))
        return [g for g, s in zip(grads, jax.tree.leaves(self._split.shared)) if s]

    def _gramian(
        self, pull: Callable[[Cotangents], PyTree]
    ) -> Float[Array, "tasks tasks"]:
        num_tasks = len(self._dtypes)
        tasks = tuple(range(num_tasks))
        if unroll_pullbacks(num_tasks):
            leaves = zip(*(jax.tree.leaves(g) for g in self._tasks(pull)))
            rows = [Rows(tasks, list(leaf)) for leaf in leaves]
        else:
            rows = [Rows(tasks, leaf) for leaf in jax.tree.leaves(self._rows(pull))]
        return gramian_of_pairs([(r, r) for r in rows], num_tasks)

    def _rows(self, pull: Callable[[Cotangents], PyTree]) -> PyTree:
        """What is pulled back, with a leading task axis."""
        num_tasks = len(self._dtypes)
        if unroll_pullbacks(num_tasks):
            return jax.tree.map(lambda *g: jnp.stack(g), *self._tasks(pull))
        basis = jnp.eye(num_tasks, dtype=jnp.float32)
        return jax.vmap(lambda e: pull(self._cotangents(e)))(basis)

    def _tasks(self, pull: Callable[[Cotangents], PyTree]) -> list[PyTree]:
        """What is pulled back, task by task."""
        basis = jnp.eye(len(self._dtypes), dtype=jnp.float32)
        return [pull(self._cotangents(e)) for e in basis]

    def _cotangents(self, weights) -> Cotangents:
        cotangents = {
            task: weight.astype(dtype)
            for weight, (task, dtype) in zip(weights, self._dtypes.items())
        }
        return device_local(cotangents, self._axis_name)

    def _average(self, grads: PyTree) -> PyTree:
        if self._axis_name is None:
            return grads
        return jax.lax.pmean(grads, self._axis_name)


def unroll_pullbacks(num_tasks: int) -> bool:
    """Whether the tasks' backward passes are unrolled rather than batched."""
    return jax.default_backend() == "cpu" and num_tasks <= _MAX_UNROLLED_ON_CPU
