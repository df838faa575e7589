"""One model, and compressed changes of it for several tasks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtjax.merging.low_rank import LowRank
from mtjax.merging.match import named_leaves, nested
from mtjax.merging.sparse import Sparse
from mtjax.merging.vectors import merge

Change = LowRank | Sparse | Array
"""The change of one leaf: a product, its elements that are not zero, or all of it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experts:
    r"""A shared model and what every task adds to it. A pytree.

    $$\theta(w) = \theta^* + \sum_t w_t v_t$$

    Attributes:
      shared: $\theta^*$. Leaves without a change (heads, counters) are as it has them:
        keep those that differ between tasks elsewhere.
      changes: $v_t$ by task and path.

    Example:
      >>> change = {"w": LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))}
      >>> experts = Experts({"w": jnp.eye(2)}, {"a": change, "b": change})
      >>> print(experts.mixed(jnp.array([1.0, 0.5]))["w"])
      [[2.5 1.5]
       [1.5 2.5]]
      >>> experts.nbytes, experts.subset(["b"]).tasks
      (48, ('b',))
    """

    shared: PyTree
    changes: dict[str, dict[str, Change]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names, sorted: the order of all weights."""
        return tuple(sorted(self.changes))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(jnp.asarray(x).nbytes for x in jax.tree.leaves(self))

    def subset(self, tasks: Iterable[str]) -> "Experts":
        """The same shared model with the changes of some tasks.

        Args:
          tasks: their names.

        Returns:
          Fewer experts.

        Raises:
          ValueError: if a name is unknown.
        """
        chosen = list(tasks)
        if unknown := sorted(set(chosen) - set(self.changes)):
            raise ValueError(
                f"`tasks` must be among {', '.join(self.tasks)}, got {unknown}."
            )
        return Experts(self.shared, {task: self.changes[task] for task in chosen})

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all leaves that some task changes."""
        every = (path for task in self.tasks for path in self.changes[task])
        return tuple(dict.fromkeys(every))

    def rows(self, path: str) -> Float[Array, "tasks ..."]:
        """The changes of one leaf, not compressed.

        Args:
          path: one of `paths`.

        Returns:
          All tasks in one array; zeros where a task leaves it as it is.
        """
        like = jnp.shape(named_leaves(self.shared)[path])
        found = (self.changes[task].get(path) for task in self.tasks)
        return jnp.stack([jnp.zeros(like) if x is None else dense(x) for x in found])

    def factors(self, path: str) -> LowRank | Float[Array, "tasks ..."]:
        """The changes of one leaf as products with a leading axis of tasks.

        Args:
          path: one of `paths`.

        Returns:
          One product if all tasks have one of the same rank, otherwise `rows`.
        """
        found = [self.changes[task].get(path) for task in self.tasks]
        products = [x for x in found if isinstance(x, LowRank)]
        if len(products) < len(found) or len({len(x.right) for x in products}) > 1:
            return self.rows(path)
        return jax.tree.map(lambda *x: jnp.stack(x), *products)

    def mixed(self, weights: Float[Array, " tasks"]) -> PyTree:
        r"""The parameters $\theta(w)$. Pure; works inside `jax.jit` and `jax.vmap`.

        Args:
          weights: $w$, in the order of `tasks`.

        Returns:
          A tree like the shared model, in its dtypes.
        """
        rows = {path: self.rows(path) for path in self.paths}
        return merge(self.shared, as_tree(self.shared, rows), weights)

    def arrays(self) -> dict[str, Array]:
        """All arrays by name, for any file format; `from_arrays` is the inverse."""
        found = {f"shared/{p}": x for p, x in named_leaves(self.shared).items()}
        for task, change in self.changes.items():
            for path, leaf in change.items():
                for form, array in _parts(leaf).items():
                    # Names of tasks may have slashes in them.
                    found[f"{form}/{quote(task, safe='')}/{path}"] = array
        return found

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Any], like: PyTree | None = None
    ) -> "Experts":
        """The experts that `arrays` came from.

        Args:
          arrays: what `Experts.arrays` returned.
          like: a tree with the structure of the shared model; nested dictionaries by
            default, with the parts of the paths as keys.

        Returns:
          The same experts.
        """
        shared: dict[str, Array] = {}
        forms: dict[tuple[str, str], dict[str, Array]] = {}
        for name in sorted(arrays):
            form, _, rest = name.partition("/")
            if form == "shared":
                shared[rest] = jnp.asarray(arrays[name])
            else:
                task, _, path = rest.partition("/")
                parts = forms.setdefault((unquote(task), path), {})
                parts[form] = jnp.asarray(arrays[name])
        changes: dict[str, dict[str, Change]] = {}
        for (task, path), parts in forms.items():
            change = _change(parts, shared[path].shape)
            changes.setdefault(task, {})[path] = change
        tree = nested(shared) if like is None else as_tree(like, shared)
        return cls(tree, changes)


def dense(change: Change) -> Float[Array, "..."]:
    """A change as one array."""
    return change.dense() if isinstance(change, LowRank | Sparse) else change


def smaller(change: LowRank | Sparse) -> Change:
    """The change itself, or as one array where that takes fewer bytes.

    Args:
      change: of a leaf.

    Returns:
      The same numbers.

    Example:
      >>> type(smaller(LowRank(jnp.ones((2, 2)), jnp.ones((2, 2))))).__name__
      'ArrayImpl'
    """
    whole = change.dense()
    size = sum(x.nbytes for x in jax.tree.leaves(change))
    return change if size <= whole.nbytes else whole


def as_tree(like: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Leaves by path in the structure of `like`, `None` where there is none."""
    found = [leaves.get(path) for path in named_leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _parts(change: Change) -> dict[str, Array]:
    if isinstance(change, LowRank):
        return {"left": change.left, "right": change.right}
    if isinstance(change, Sparse):
        return {"values": change.values, "places": change.places}
    return {"dense": change}


def _change(parts: Mapping[str, Array], shape: tuple[int, ...]) -> Change:
    if "left" in parts:
        return LowRank(parts["left"], parts["right"])
    if "values" in parts:
        return Sparse(parts["values"], parts["places"], tuple(shape))
    return parts["dense"]
