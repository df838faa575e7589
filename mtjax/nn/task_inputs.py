"""Rankers whose tasks have inputs of their own: towers, any ranker, or PLE on them."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.nn.ple import CGC
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
    """Stands alone: a tower per task on the task's own input."""

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
    with `mtjax.nn.PLE` is the other way. Attributes are those of `mtjax.nn.PLE`.
    """

    tasks: tuple[str, ...]
    own: int = 2
    shared: int = 1
    widths: tuple[tuple[int, ...], ...] = ((16,),)
    tower: tuple[int, ...] = (8,)
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, bottom: Bottom, *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        num_tasks, (batch, _, width) = len(self.tasks), bottom.tasks.shape
        h = jnp.broadcast_to(bottom.tasks, (batch, num_tasks, width))
        h = jnp.concatenate([h, bottom.shared[:, None]], axis=1)
        for i, widths in enumerate(self.widths):
            above = len(self.widths) - 1 - i
            level = CGC(
                num_tasks,
                self.own,
                self.shared,
                widths,
                levels_above=above,
                dropout=self.dropout,
                name=f"level_{i}",
            )
            h = level(h, train=train)
        towers = Towers(self.tasks, self.tower, self.dropout, name="task_towers")
        return towers(h, train=train)
