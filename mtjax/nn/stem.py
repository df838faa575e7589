"""STEM: an embedding per task, which other tasks read but do not change."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts
from mtjax.nn.gates import Gate, mix
from mtjax.nn.towers import Towers, check_tasks


class STEMLevel(nn.Module):
    """Experts of every task and shared ones; other tasks' enter gates as constants.

    Attributes:
      num_tasks: T, at least 1.
      own: number of experts of each task's own, at least 1.
      shared: number of shared experts, at least 1.
      widths: widths of an expert's layers.
      gate_hidden: widths of the gates' hidden layers.
      levels_above: how many levels follow. The last one, 0, has no shared output.
      dropout: rate in experts, in [0, 1).
    """

    num_tasks: int
    own: int
    shared: int
    widths: tuple[int, ...]
    gate_hidden: tuple[int, ...]
    levels_above: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch groups features"], *, train: bool = False
    ) -> Float[Array, "batch groups_out width"]:
        """A representation for every task and, unless it is the last level, a shared.

        Args:
          x: one input for each task and a shared one behind them.
          train: whether to drop.

        Returns:
          One vector per task; behind them the shared one, if levels follow.
        """
        per_task, common = x[:, :-1], x[:, -1]
        num_own = self.num_tasks * self.own
        options = {"widths": self.widths, "dropout": self.dropout}
        private = "own_experts" if self.levels_above else "task_experts"
        experts = Experts(num_own, **options, name=private)
        own = experts(jnp.repeat(per_task, self.own, axis=1), train=train)
        experts = Experts(self.shared, **options, name="shared_experts")
        outputs = jnp.concatenate([own, experts(common, train=train)], axis=1)
        # As in `mtjax.nn.CGC`.
        private = "task_gates" if self.levels_above < 2 else "gates"
        n = num_own + self.shared
        gates = Gate(self.num_tasks, n, hidden=self.gate_hidden, name=private)
        weights = gates(per_task + common[:, None], train=train)
        owner = np.repeat(np.arange(self.num_tasks), self.own)
        others = owner[None] != np.arange(self.num_tasks)[:, None]
        others = np.pad(others, [(0, 0), (0, self.shared)])[None]
        mixed = mix(jnp.where(others, 0.0, weights), outputs)
        mixed += mix(jnp.where(others, weights, 0.0), jax.lax.stop_gradient(outputs))
        if not self.levels_above:
            return mixed
        gate = Gate(1, n, hidden=self.gate_hidden, name="shared_gate")
        return jnp.concatenate([mixed, mix(gate(common), outputs)], axis=1)


class STEM(nn.Module):
    """Shared and task-specific embeddings: all forward, task-specific backward.

    A gate of a task weighs the experts of all tasks, but a task's loss moves only its
    own and the shared experts, embeddings and gates.

    Attributes:
      tasks: their names; at least one, all different, none of them `"shared"`.
      own: number of experts of each task's own in every level, at least 1.
      shared: number of shared experts in every level, at least 1.
      widths: by level, the widths of an expert's layers. With further levels a shared
        representation, through which all gradients flow, is formed between them.
      gate_hidden: widths of the gates' hidden layers.
      tower: widths of the towers' hidden layers.
      dropout: rate in experts and towers, in [0, 1); needs `rngs={"dropout": key}` in
        training.

    Raises:
      ValueError: if tasks, experts, levels or inputs are missing.

    Example:
      >>> model = STEM(("click", "like"), shared=2, widths=((16,),), gate_hidden=(8,))
      >>> x = {name: jnp.ones((3, 6)) for name in ("click", "like", "shared")}
      >>> variables = model.init(jax.random.key(0), x)
      >>> model.apply(variables, x)["like"].shape
      (3,)

    References:
      STEM: Unleashing the Power of Embeddings for Multi-task Recommendation, AAAI 2024.
    """

    tasks: tuple[str, ...]
    own: int = 1
    shared: int = 8
    widths: tuple[tuple[int, ...], ...] = ((512, 512, 512),)
    gate_hidden: tuple[int, ...] = (128, 64)
    tower: tuple[int, ...] = (128, 64)
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Mapping[str, Float[Array, "batch features"]], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task.

        Args:
          x: embedded inputs from every task's own table, by task, and from the shared
            table as `"shared"`, all of one width.
          train: whether to drop.

        Returns:
          One logit per example, by task.
        """
        check_tasks(self.tasks)
        names = (*self.tasks, "shared")
        if set(x) != set(names) or "shared" in self.tasks:
            raise ValueError(
                '`x` must hold one input for each of `tasks` and one named "shared", '
                f"which is no task, got {sorted(x)} for tasks {self.tasks!r}."
            )
        if self.own < 1 or self.shared < 1 or not self.widths:
            raise ValueError(
                "`own` and `shared` must be at least 1 and `widths` must describe a "
                f"level, got {self.own!r}, {self.shared!r} and {self.widths!r}."
            )
        h = jnp.stack([x[name] for name in names], axis=1)
        for i, widths in enumerate(self.widths):
            level = STEMLevel(
                num_tasks=len(self.tasks),
                own=self.own,
                shared=self.shared,
                widths=widths,
                gate_hidden=self.gate_hidden,
                levels_above=len(self.widths) - 1 - i,
                dropout=self.dropout,
                name=f"level_{i}",
            )
            h = level(h, train=train)
        return Towers(self.tasks, self.tower, self.dropout, name="task_towers")(
            h, train=train
        )
