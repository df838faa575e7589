"""Rankers whose tasks have inputs of their own: towers, any ranker, or PLE on them."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.nn.ple import PLE
from mtjax.nn.towers import Towers


class Bottom(NamedTuple):
    """What a ranker reads.

    Attributes:
      tasks: one input per task; a single one for all if nothing tells tasks apart.
      shared: fields as they are, and interests averaged over tasks.
    """

    tasks: Float[Array, "batch tasks features"]
    shared: Float[Array, "batch features"]


class OwnTowers(nn.Module):
    """Stands alone: a tower per task on the task's own input.

    Attributes are those of `mtjax.nn.Towers`.

    Example:
      >>> import jax
      >>> head, x = OwnTowers(("click", "like"), (8,)), jnp.ones((3, 2, 5))
      >>> bottom = Bottom(x, x[:, 0])
      >>> variables = head.init(jax.random.key(0), bottom)
      >>> head.apply(variables, bottom)["like"].shape
      (3,)
    """

    tasks: tuple[str, ...]
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, bottom: Bottom, *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        x = bottom.tasks[:, 0] if bottom.tasks.shape[1] == 1 else bottom.tasks
        towers = Towers(self.tasks, self.hidden, self.dropout, name="task_towers")
        return towers(x, train=train)


class EachTask(nn.Module):
    """Under any ranker, such as MMoE: it runs once per task, on the task's own input.

    Shared experts are so evaluated on every task's input, weighed by its own gate.

    Attributes:
      tasks: those of the ranker, in the same order.
      ranker: a Linen module from `(batch, features)` to logits by task.
    """

    tasks: tuple[str, ...]
    ranker: nn.Module

    @nn.compact
    def __call__(
        self, bottom: Bottom, *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """Of every run, the logit of its task."""
        runs = [self.ranker(x, train=train) for x in bottom.tasks.swapaxes(0, 1)]
        if len(runs) == 1:
            return runs[0]
        return {task: run[task] for task, run in zip(self.tasks, runs)}


class Extraction(nn.Module):
    """Under PLE: tasks' experts and gates read their own input, shared ones `shared`.

    Which input shared experts read is not told by summaries of the paper; `EachTask`
    with `mtjax.nn.PLE` is the other way.

    Attributes:
      ranker: a `mtjax.nn.PLE` for the tasks.
    """

    ranker: PLE

    @nn.compact
    def __call__(
        self, bottom: Bottom, *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        batch, _, width = bottom.tasks.shape
        own = jnp.broadcast_to(bottom.tasks, (batch, len(self.ranker.tasks), width))
        inputs = jnp.concatenate([own, bottom.shared[:, None]], axis=1)
        return self.ranker(inputs, train=train)
