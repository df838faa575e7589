"""The split of a model's parameters into shared and task-specific ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mtjax.gradients._reach import reaching_inputs

PyTree = Any


@dataclass(frozen=True)
class ParameterSplit:
    """Which task reaches which parameter, and which parameters count as shared.

    A parameter is shared if the losses of two or more tasks reach it: its gradients are
    what a balancer balances. Every other parameter belongs to the one task that reaches
    it and follows that task's own gradient.

    Attributes:
      tasks: task names, sorted.
      owners: params-shaped; at each leaf the names of the tasks that reach it.
      shared: params-shaped; at each leaf True or False.
    """

    tasks: tuple[str, ...]
    owners: PyTree
    shared: PyTree

    def owner_leaves(self) -> list[tuple[str, ...]]:
        """The leaves of `owners`, in the order of the parameters' leaves."""
        return jax.tree.leaves(self.owners, is_leaf=lambda x: isinstance(x, tuple))

    def labels(self) -> PyTree:
        """Labels for `optax.multi_transform`: "shared", a task's name, or "unused".

        A leaf that several tasks reach but that was declared not shared gets the
        label "shared" as well, since no single task owns it.
        """
        return jax.tree.map(
            lambda shared, owners: (
                "unused"
                if not owners
                else owners[0]
                if not shared and len(owners) == 1
                else "shared"
            ),
            self.shared,
            self.owners,
        )

    def describe(self, params: PyTree) -> str:
        """Renders a table of leaf, shape, and whose the leaf is.

        Args:
          params: the parameters, or anything with their structure and shapes.

        Returns:
          The table as text, with a line of totals.

        Example:
          >>> import jax.numpy as jnp, mtjax
          >>> def losses_fn(params):
          ...     z = params["trunk"]
          ...     return {"a": z @ params["head_a"], "b": z.sum()}
          >>> params = {"trunk": jnp.ones(3), "head_a": jnp.ones(3)}
          >>> print(mtjax.parameter_split(losses_fn, params).describe(params))
          parameter  shape  belongs to
          head_a     (3,)   a
          trunk      (3,)   shared
          shared: 3 parameters in 1 leaf; task-specific: 3 in 1; unused: 0 in 0
        """
        rows = [("parameter", "shape", "belongs to")]
        totals = {"shared": [0, 0], "task-specific": [0, 0], "unused": [0, 0]}
        leaves = jax.tree_util.tree_leaves_with_path(params)
        shared_leaves = jax.tree.leaves(self.shared)
        for (path, leaf), shared, owners in zip(
            leaves, shared_leaves, self.owner_leaves()
        ):
            if not owners:
                group, whose = "unused", "no task (zero update)"
            elif shared:
                group, whose = "shared", "shared"
                if len(owners) < len(self.tasks):
                    whose = "shared by " + ", ".join(owners)
            else:
                group, whose = "task-specific", ", ".join(owners)
            rows.append((path_name(path), str(tuple(leaf.shape)), whose))
            totals[group][0] += leaf.size
            totals[group][1] += 1
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [
            f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {whose}"
            for name, shape, whose in rows
        ]
        (s, sl), (t, tl), (u, ul) = totals.values()
        lines.append(
            f"shared: {s} parameters in {sl} {'leaf' if sl == 1 else 'leaves'}; "
            f"task-specific: {t} in {tl}; unused: {u} in {ul}"
        )
        return "\n".join(lines)


def split_of_pullback(
    pullback: Callable[[dict[str, jax.Array]], PyTree],
    losses: dict[str, jax.Array],
    params: PyTree,
    shared: Callable[[str], bool] | None,
) -> ParameterSplit:
    """Reads the split off the graph of the backward pass.

    A task reaches a leaf if its loss's cotangent enters the computation of the leaf's
    gradient. In the backward pass `stop_gradient`, integers and custom derivatives have
    had their effect already.

    Args:
      pullback: maps one cotangent per loss to the gradient of the parameters.
      losses: the losses, in the order of the tasks.
      params: the parameters.
      shared: overrides which leaves count as shared, see `value_and_task_grads`.

    Returns:
      The split.

    Raises:
      ValueError: if `shared` selects no parameter although there are several tasks.
    """
    tasks = tuple(losses)
    jaxpr = jax.make_jaxpr(lambda c: jax.tree.leaves(pullback(c)))(losses).jaxpr
    sets = reaching_inputs(jaxpr, [1 << k for k in range(len(tasks))])
    owners = [tuple(t for k, t in enumerate(tasks) if s >> k & 1) for s in sets]
    paths = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    if shared is None:
        is_shared = [len(o) > 1 for o in owners]
    else:
        is_shared = [bool(shared(path)) and bool(o) for path, o in zip(paths, owners)]
        if len(tasks) > 1 and not any(is_shared):
            raise ValueError(
                "`shared` declared none of the parameters that a task reaches shared, "
                f"which leaves nothing to balance; it was asked about {paths[:5]}"
                f"{' …' if len(paths) > 5 else ''}."
            )
    structure = jax.tree.structure(params)
    return ParameterSplit(
        tasks=tasks,
        owners=jax.tree.unflatten(structure, owners),
        shared=jax.tree.unflatten(structure, is_shared),
    )


def path_name(path: tuple[Any, ...]) -> str:
    """Names a leaf as people write it: `encoder/dense_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
