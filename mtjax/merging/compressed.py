"""Several fine-tuned models as one task vector and one bit per element and model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtjax.merging.masks import masked, unpack_mask
from mtjax.merging.match import Where, named_leaves, nested
from mtjax.merging.vectors import task_vectors


@dataclass(frozen=True, eq=False)
class CompressedTasks:
    r"""A base, one merged task vector, and per task the elements that it takes of it.

    $$\hat\theta_t = \theta_0 + s_t \, m_t \odot \tau$$

    Of T models with D elements of b bits it holds (2b + T) D bits in place of b T D.

    Attributes:
      base: $\theta_0$. Leaves outside of the vector (heads, counters) are restored from
        here: keep those that differ between tasks elsewhere.
      vector: $\tau$, a tree like the base in float32, `None` at leaves that were not
        merged; what `Merger.vector` returns.
      masks: $m_t$ by task, as `pack_mask` packs them.
      scales: $s_t$ by task, 1 where there is none.

    Raises:
      ValueError: if the base does not match the vector, a mask has the wrong number of
        bytes, or `scales` names a task without a mask.

    Example:
      >>> from mtjax.merging.masks import pack_mask
      >>> base, vector = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, 2.0, 3.0])}
      >>> mask = {"w": jnp.array([True, False, True])}
      >>> tasks = CompressedTasks(base, vector, {"digits": pack_mask(mask)})
      >>> tasks.restore("digits")["w"], tasks.nbytes
      (Array([2., 1., 4.], dtype=float32), 25)
    """

    base: PyTree
    vector: PyTree
    masks: Mapping[str, UInt8[Array, " bytes"]]
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        """Checks that everything fits together."""
        leaves = named_leaves(self.base)
        for path, change in named_leaves(self.vector).items():
            if path not in leaves or np.shape(leaves[path]) != np.shape(change):
                raise ValueError(
                    "`vector` must have the leaves and shapes of `base`, got "
                    f"{np.shape(change)} at {path!r}; take it from `Merger.vector`."
                )
        expected = -(-self.elements // 8)
        for task, mask in self.masks.items():
            if mask.shape != (expected,):
                raise ValueError(
                    f"`masks` must hold {expected} bytes per task for {self.elements} "
                    f"elements, got {mask.shape} for {task!r}; use `pack_mask`."
                )
        if unknown := sorted(self.scales.keys() - self.masks.keys()):
            raise ValueError(
                f"`scales` must name tasks that have a mask, got {unknown}."
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(sorted(self.masks))

    @property
    def elements(self) -> int:
        """Number of elements of the vector, and of bits per task."""
        return sum(np.size(leaf) for leaf in jax.tree.leaves(self.vector))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored: the base and the vector once, masks, scales."""
        arrays = jax.tree.leaves((self.base, self.vector, dict(self.masks)))
        return sum(jnp.asarray(x).nbytes for x in arrays) + 4 * len(self.scales)

    def mask(self, task: str) -> PyTree:
        """The mask of a task: a tree like the vector, of booleans.

        Args:
          task: its name.

        Returns:
          The mask.

        Raises:
          ValueError: if there is no such task.
        """
        if task not in self.masks:
            raise ValueError(
                f"`task` must be one of {', '.join(self.tasks)}, got {task!r}; a new "
                "one needs a new vector and new masks of all tasks."
            )
        return unpack_mask(self.masks[task], self.vector)

    def restore(self, task: str) -> PyTree:
        """The parameters for one task. Pure; works inside `jax.jit`.

        Args:
          task: its name.

        Returns:
          A tree like the base, in its dtypes.

        Raises:
          ValueError: if there is no such task.
        """
        taken = masked(self.vector, self.mask(task))
        return apply_vector(self.base, taken, self.scales.get(task, 1.0))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, which appears when it is complete.

        Args:
          file: to write; replaced if it exists.
        """
        arrays = {
            **{f"base/{path}": x for path, x in named_leaves(self.base).items()},
            **{f"vector/{path}": x for path, x in named_leaves(self.vector).items()},
            **{f"mask/{task}": x for task, x in self.masks.items()},
            **{f"scale/{t}": np.float32(scale) for t, scale in self.scales.items()},
        }
        # Arrays in another order would be written in the order of their memory.
        plain = {name: np.asarray(x, order="C") for name, x in arrays.items()}
        target = Path(file)
        partial = target.with_name(target.name + ".partial")
        save_file(plain, partial, {"elements": str(self.elements)})
        partial.replace(target)

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], like: PyTree | None = None
    ) -> "CompressedTasks":
        """Reads what `save` wrote.

        Args:
          file: to read.
          like: a tree with the structure of the base (its leaves do not matter; what
            `jax.eval_shape` of an `init` returns will do); nested dictionaries by
            default, with the parts of the paths as keys.

        Returns:
          The same tasks.

        Raises:
          ValueError: if the file is not complete or not one of `save`, or `like` has
            other leaves.
        """
        groups: dict[str, dict[str, Any]] = {"base": {}, "vector": {}}
        groups |= {"mask": {}, "scale": {}}
        try:
            with safe_open(file, framework="numpy") as stored:
                elements = (stored.metadata() or {})["elements"]
                for name in sorted(stored.keys()):
                    group, _, rest = name.partition("/")
                    groups[group][rest] = jnp.asarray(stored.get_tensor(name))
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"`file` must be a complete file that `save` wrote, got {file}: {error}"
            ) from error
        base = _as_tree(groups["base"], like)
        vector = jax.tree.unflatten(
            jax.tree.structure(base),
            [groups["vector"].get(path) for path in named_leaves(base)],
        )
        scales = {task: float(x) for task, x in groups["scale"].items()}
        tasks = cls(base, vector, groups["mask"], scales)
        if str(tasks.elements) != elements:
            raise ValueError(
                f"`file` must hold a vector of {elements} elements, got "
                f"{tasks.elements} in {file}; write it again."
            )
        return tasks


def task_vector(base: PyTree, model: PyTree, *, where: Where = None) -> PyTree:
    r"""What fine-tuning changed in one model, $\tau = \theta - \theta_0$ in float32.

    Args:
      base: $\theta_0$.
      model: $\theta$, a tree like the base.
      where: which leaves; see `Merger`.

    Returns:
      A tree like the base, `None` at leaves that are not merged.

    Raises:
      ValueError: if the model does not match the base.
    """
    rows = task_vectors(base, [model], where=where)
    return jax.tree.map(lambda row: row[0], rows)


def apply_vector(base: PyTree, vector: PyTree, scale: Any = 1.0) -> PyTree:
    r"""The base plus a multiple of one task vector, $\theta_0 + s \tau$.

    Args:
      base: $\theta_0$.
      vector: $\tau$, `None` at leaves that stay as they are in the base.
      scale: $s$, a number.

    Returns:
      A tree like the base, in its dtypes; the sum is taken in float32.
    """

    def leaf(start, change):
        if change is None:
            return start
        moved = jnp.asarray(start, jnp.float32) + scale * change
        return moved.astype(jnp.asarray(start).dtype)

    return jax.tree.map(leaf, base, vector, is_leaf=lambda x: x is None)


def _as_tree(leaves: Mapping[str, Any], like: PyTree | None) -> PyTree:
    """Leaves by path in the structure of `like`, or in nested dictionaries."""
    if like is not None:
        paths = named_leaves(like)
        if paths.keys() != leaves.keys():
            raise ValueError(
                "`like` must have the leaves of the file, got a difference at "
                f"{sorted(paths.keys() ^ leaves.keys())[:5]}."
            )
        return jax.tree.unflatten(jax.tree.structure(like), map(leaves.get, paths))
    return nested(leaves)
