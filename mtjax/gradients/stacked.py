"""The `stacked` engine: one pullback per task, unrolled or batched by `vmap`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.gradients._axis import device_local
from mtjax.gradients.split import ParameterSplit
from mtjax.gradients.task_gradients import gramian_of_rows

PyTree = Any

# Measured by experiments/benchmarks/pullbacks.py: on CPUs separate backward passes beat
# batched ones up to here, after which compiling them takes longer than it saves.
_MAX_UNROLLED_ON_CPU = 16


class StackedEngine:
    """Per-task gradients as rows of a Jacobian, averaged over devices if asked."""

    def __init__(
        self,
        pullback: Callable[[list[Array]], Sequence[Array]],
        loss_dtypes: Sequence[Any],
        split: ParameterSplit,
        axis_name: str | None = None,
        num_probes: int = 0,
    ):
        """Wraps a pullback.

        Args:
          pullback: maps one cotangent per loss to one cotangent per leaf.
          loss_dtypes: the types of the losses, in the order of the tasks.
          split: the parameter split; its leaves are the pullback's first leaves.
          axis_name: mesh or `pmap` axis to average gradients over.
          num_probes: how many further leaves (a shared representation) the pullback
            has; if any, the Gramian is taken of these, not of the shared parameters.
        """
        self.name = "representation" if num_probes else "stacked"
        self._pullback = pullback
        self._loss_dtypes = loss_dtypes
        self._split = split
        self._axis_name = axis_name
        self._num_probes = num_probes

    def pull(self, weights: Float[Array, " tasks"]) -> PyTree:
        """Params-shaped sum of the tasks' gradients with the given weights."""
        leaves = self._raw_pull(weights)
        params = leaves[: len(leaves) - self._num_probes]
        return self._unflatten(self._average(params))

    def stack(self) -> PyTree:
        """Params-shaped, every leaf with a leading task axis."""
        rows = self._rows(lambda leaves: leaves[: len(leaves) - self._num_probes])
        return self._unflatten(self._average(rows))

    def gramian(self) -> Float[Array, "tasks tasks"]:
        """Inner products of the tasks' gradients, float32."""
        num_tasks = len(self._loss_dtypes)
        if self._num_probes:
            gramian = gramian_of_rows(
                self._rows(lambda leaves: leaves[-self._num_probes :])
            )
            if self._axis_name is None:
                return gramian
            # Each device holds its part of the batch, whose mean loss counts 1/n:
            # the inner products add up over devices.
            devices = jax.lax.axis_size(self._axis_name)
            return jax.lax.pmean(gramian, self._axis_name) / devices
        shared = jax.tree.leaves(self._split.shared)
        rows = self._rows(lambda leaves: [g for g, s in zip(leaves, shared) if s])
        if not rows:
            return jnp.zeros((num_tasks, num_tasks), jnp.float32)
        return gramian_of_rows(self._average(rows))

    def _rows(self, select) -> list[Array]:
        """The selected leaves with a leading task axis."""
        num_tasks = len(self._loss_dtypes)
        basis = jnp.eye(num_tasks, dtype=jnp.float32)
        if unroll_pullbacks(num_tasks):
            rows = [select(self._raw_pull(basis[k])) for k in range(num_tasks)]
            return [jnp.stack(tasks) for tasks in zip(*rows)]
        return jax.vmap(lambda e: select(self._raw_pull(e)))(basis)

    def _raw_pull(self, weights) -> list[Array]:
        cotangents = [w.astype(d) for w, d in zip(weights, self._loss_dtypes)]
        if self._axis_name is not None:
            cotangents = [device_local(w, self._axis_name) for w in cotangents]
        return list(self._pullback(cotangents))

    def _average(self, leaves):
        if self._axis_name is None:
            return leaves
        return jax.lax.pmean(leaves, self._axis_name)

    def _unflatten(self, leaves) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(self._split.shared), leaves)


def unroll_pullbacks(num_tasks: int) -> bool:
    """Whether the tasks' backward passes are unrolled rather than batched."""
    return jax.default_backend() == "cpu" and num_tasks <= _MAX_UNROLLED_ON_CPU
