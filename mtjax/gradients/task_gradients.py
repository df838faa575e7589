"""Gradients that know their tasks: a pullback with views, not K gradients in memory."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from mtjax.gradients._rows import Rows
from mtjax.gradients.gramian import gramian_of_pairs
from mtjax.gradients.split import ParameterSplit, path_name

PyTree = Any


@runtime_checkable
class Engine(Protocol):
    """How per-task gradients are computed. The engines give the same numbers."""

    name: str

    def pull(self, weights: Float[Array, " tasks"]) -> PyTree:
        """Params-shaped sum of the tasks' gradients with the given weights."""

    def stack(self) -> PyTree:
        """Params-shaped, every leaf with a leading task axis."""

    def gramian(self) -> Float[Array, "tasks tasks"]:
        """Inner products of the tasks' gradients, float32."""

    def inner(self, direction: PyTree) -> Float[Array, " tasks"]:
        """Inner products of the tasks' gradients with a direction, float32."""


class TaskGradients:
    """The gradients of several task losses, computed only as far as they are asked for.

    Made by `mtjax.value_and_task_grads`, or by `from_stacked` from gradients that are
    there already. Consumed by the transforms of `mtjax.balancing`, which stand before
    the optimizer in an `optax.chain`.

    It is not a pytree, on purpose: a transform that does not know about tasks raises
    instead of computing something that looks like an update. Inside `jit` nothing is
    computed twice and nothing is computed that is not used.

    Attributes:
      split: which task reaches which parameter (`mtjax.ParameterSplit`).
    """

    def __init__(
        self,
        split: ParameterSplit,
        engine: Engine,
        factors: Float[Array, " tasks"] | None = None,
    ):
        """Wraps an engine; `factors` scale the tasks' gradients (none: all one)."""
        self.split = split
        self._engine = engine
        self._factors = factors

    @classmethod
    def from_stacked(
        cls,
        grads: PyTree,
        tasks: Sequence[str] | None = None,
        *,
        split: ParameterSplit | None = None,
    ) -> "TaskGradients":
        """Wraps gradients stacked on a leading task axis.

        Args:
          grads: params-shaped, every leaf of shape `(tasks, *leaf.shape)`.
          tasks: sorted task names; "0", "1", … if not given.
          split: whose the parameters are, tasks included; all count as shared if not
            given.

        Returns:
          The task gradients.

        Raises:
          ValueError: if the leading axes of two leaves differ, or differ from the
            number of `tasks`.
        """
        leaves = jax.tree_util.tree_leaves_with_path(grads)
        sizes = {path_name(p): jnp.shape(x)[:1] for p, x in leaves}
        if len(set(sizes.values())) != 1 or () in sizes.values():
            raise ValueError(
                "Stacked gradients must have one leading task axis of the same size on "
                f"every leaf, got {sizes}; stack the tasks' gradients with "
                "`jax.tree.map(lambda *g: jnp.stack(g), *grads_per_task)`."
            )
        (num_tasks,) = next(iter(sizes.values()))
        if split is not None:
            tasks = split.tasks
        if tasks is None:
            tasks = tuple(str(i) for i in range(num_tasks))
        if len(tasks) != num_tasks:
            raise ValueError(
                f"`tasks` must name the {num_tasks} tasks of the leading axis, got "
                f"{tuple(tasks)}."
            )
        if split is None:
            split = ParameterSplit(
                tasks=tuple(tasks),
                owners=jax.tree.map(lambda _: tuple(tasks), grads),
                shared=jax.tree.map(lambda _: True, grads),
            )
        return cls(split, _Stacked(grads, split))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, sorted: the order of every `(tasks,)` array."""
        return self.split.tasks

    @property
    def shared(self) -> PyTree:
        """Params-shaped: True where a leaf counts as shared."""
        return self.split.shared

    @property
    def factors(self) -> Float[Array, " tasks"]:
        """What `scale` has multiplied the tasks' gradients by, float32."""
        ones = jnp.ones(len(self.tasks), jnp.float32)
        return ones if self._factors is None else self._factors

    def gramian(self) -> Float[Array, "tasks tasks"]:
        """Inner products of the tasks' gradients on the shared parameters, float32."""
        gramian = self._engine.gramian()
        if self._factors is None:
            return gramian
        return gramian * jnp.outer(self._factors, self._factors)

    def combine(
        self, weights: ArrayLike | Sequence[float | int] | None = None
    ) -> PyTree:
        """One update: weighted on shared leaves, each task's own gradient on its own.

        Costs one backward pass (plus, with `weights`, one through the task-specific
        layers alone). To weigh task-specific leaves as well, `scale` first.

        Args:
          weights: one weight per task, in the order of `tasks`; none means ones.

        Returns:
          Params-shaped, in the parameters' types; zero on leaves that no loss reaches.
        """
        own_weights = self.factors
        if weights is None:
            return self._engine.pull(own_weights)
        shared = self._engine.pull(own_weights * self._checked(weights))
        if all(jax.tree.leaves(self.shared)):
            return shared
        own = self._engine.pull(own_weights)
        return jax.tree.map(
            lambda is_shared, s, o: s if is_shared else o, self.shared, shared, own
        )

    def stack(self) -> PyTree:
        """Every leaf with a leading task axis: K backward passes, K times the memory.

        Returns:
          Params-shaped, leaves of shape `(tasks, *leaf.shape)`; zero rows where a
          task does not reach a leaf.
        """
        stacked = self._engine.stack()
        if self._factors is None:
            return stacked
        return jax.tree.map(
            lambda g: (
                g * self._factors.astype(g.dtype).reshape(-1, *[1] * (g.ndim - 1))
            ),
            stacked,
        )

    def inner(self, direction: PyTree) -> Float[Array, " tasks"]:
        """Inner product of each task's gradient with a direction: its slope along it.

        Costs about one forward pass: nothing per task.

        Args:
          direction: params-shaped.

        Returns:
          The products over all leaves, shared and task-specific, float32.
        """
        products = self._engine.inner(direction)
        return products if self._factors is None else products * self._factors

    def scale(self, weights: ArrayLike | Sequence[float | int]) -> "TaskGradients":
        """Scales each task's gradient, on shared and on task-specific leaves. Free."""
        weights = self._checked(weights)
        if self._factors is not None:
            weights = weights * self._factors
        return TaskGradients(self.split, self._engine, weights)

    def _checked(
        self, weights: ArrayLike | Sequence[float | int]
    ) -> Float[Array, " tasks"]:
        checked = jnp.asarray(weights, jnp.float32)
        if checked.shape != (len(self.tasks),):
            raise ValueError(
                "`weights` must have shape (tasks,), one entry for each of "
                f"{self.tasks}, got shape {checked.shape}."
            )
        return checked

    def __repr__(self) -> str:
        """Names the tasks and the engine."""
        return f"TaskGradients(tasks={self.tasks}, engine={self._engine.name!r})"

    def _refuse(self, *unused: Any):
        """Raises: task gradients are not an array to compute with."""
        raise TypeError(
            "A transform that needs plain gradients got `TaskGradients`. Put a "
            "balancer such as `mtjax.pcgrad()` before it in `optax.chain`."
        )

    __jax_array__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __neg__ = _refuse


class _Stacked:
    """Engine over gradients that are in memory already."""

    name = "given"

    def __init__(self, grads: PyTree, split: ParameterSplit):
        self._grads = grads
        self._split = split

    def pull(self, weights):
        return jax.tree.map(
            lambda g: jnp.einsum(
                "k,k...->...", weights, g, precision=jax.lax.Precision.HIGHEST
            ).astype(g.dtype),
            self._grads,
        )

    def stack(self):
        return self._grads

    def gramian(self):
        tasks = tuple(range(len(self._split.tasks)))
        leaves = zip(jax.tree.leaves(self._grads), jax.tree.leaves(self._split.shared))
        rows = [Rows(tasks, g) for g, is_shared in leaves if is_shared]
        return gramian_of_pairs([(r, r) for r in rows], len(tasks))

    def inner(self, direction):
        products = (
            jnp.tensordot(
                g.astype(jnp.float32),
                d.astype(jnp.float32),
                axes=d.ndim,
                precision=jax.lax.Precision.HIGHEST,
            )
            for g, d in zip(jax.tree.leaves(self._grads), jax.tree.leaves(direction))
        )
        return sum(products, start=jnp.zeros(len(self._split.tasks), jnp.float32))
