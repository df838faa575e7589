"""Tables of their own for every task, and shared ones: the embeddings of STEM."""

from collections.abc import Callable

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Int

from mtjax.nn.fields import FieldEmbeddings
from mtjax.nn.towers import check_tasks


class TaskFieldEmbeddings(nn.Module):
    """A set of tables for every task and a shared one.

    The tables of a task are arrays of their own in modules named `task_<task>`, which
    `mtjax.nn.is_shared` says belong to one task.

    Attributes:
      tasks: their names; at least one, all different, none of them `"shared"`.
      make: makes the embeddings of one task, such as
        `functools.partial(FieldEmbeddings, sizes, width=16)`.

    Raises:
      ValueError: if tasks are missing, equal or named `"shared"`.

    Example:
      >>> import functools, jax
      >>> import jax.numpy as jnp
      >>> make = functools.partial(FieldEmbeddings, {"shop": 30, "brand": 6}, width=4)
      >>> embeddings = TaskFieldEmbeddings(("click", "like"), make)
      >>> ids = jnp.ones((3, 2), int)
      >>> variables = embeddings.init(jax.random.key(0), ids)
      >>> sorted(variables["params"])
      ['shared', 'task_click', 'task_like']
      >>> x = embeddings.apply(variables, ids)
      >>> {name: vectors.shape for name, vectors in x.items()}
      {'click': (3, 8), 'like': (3, 8), 'shared': (3, 8)}

    References:
      STEM: Unleashing the Power of Embeddings for Multi-task Recommendation, AAAI 2024;
      `mtjax.nn.STEM` reads what this returns.
    """

    tasks: tuple[str, ...]
    make: Callable[[], FieldEmbeddings]

    def setup(self) -> None:
        """Makes a module for each task, and the shared one."""
        check_tasks(self.tasks)
        if "shared" in self.tasks:
            raise ValueError(
                '`tasks` must not hold "shared", the name of the shared tables, got '
                f"{self.tasks!r}."
            )
        self.task = {name: self.make() for name in self.tasks}
        self.shared = self.make()

    def __call__(
        self,
        categorical: Int[Array | np.ndarray, "batch columns"],
        numeric: Float[Array | np.ndarray, "batch numbers"] | None = None,
    ) -> dict[str, Float[Array, "batch features"]]:
        """What `FieldEmbeddings` says, by task and as `"shared"`."""
        return {
            name: module(categorical, numeric) for name, module in self._all().items()
        }

    def embed(
        self, field: str, ids: Int[Array | np.ndarray, "*shape"]
    ) -> dict[str, Float[Array, "*shape width"]]:
        """What `FieldEmbeddings.embed` says, by task and as `"shared"`."""
        return {name: module.embed(field, ids) for name, module in self._all().items()}

    def _all(self) -> dict[str, FieldEmbeddings]:
        return {**self.task, "shared": self.shared}
