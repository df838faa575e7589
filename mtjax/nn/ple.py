"""Progressive layered extraction: experts of each task's own beside shared ones."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts
from mtjax.nn.gates import Gate, mix
from mtjax.nn.towers import Towers, check_tasks


class CGC(nn.Module):
    r"""Customised gate control: one level of PLE.

    .. math:: g^t = w^t(z^t) \, [E_{t,1}; \dots; E_{t,m_t}; E_{s,1}; \dots; E_{s,m_s}]

    Modules are named `task_...` only where their parameters reach a single task, for
    which the level must know how many levels follow: see `mtjax.nn.is_shared`.

    Attributes:
      num_tasks: T, at least 1.
      own: number of experts of each task's own, at least 1.
      shared: number of shared experts; with none, tasks are apart.
      widths: widths of an expert's layers.
      gate_hidden: widths of the gates' hidden layers.
      levels_above: how many levels follow. The last one, 0, has no shared output.
      dropout: rate in experts, in [0, 1).
      gate_dropout: rate of `mtjax.nn.gates.gate_dropout`, in [0, 1).

    Raises:
      ValueError: if numbers of experts are out of range.
    """

    num_tasks: int
    own: int = 2
    shared: int = 1
    widths: tuple[int, ...] = (16,)
    gate_hidden: tuple[int, ...] = ()
    levels_above: int = 0
    dropout: float = 0.0
    gate_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch features"] | Float[Array, "batch groups features"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch groups_out width"]:
        """A representation for every task and, unless it is the last level, a shared.

        Args:
          x: read by all, or one input for each task and a shared one behind them.
          train: whether to drop.

        Returns:
          One vector per task; behind them the shared one, if levels follow.
        """
        if self.own < 1 or self.shared < 0:
            raise ValueError(
                "`own` must be at least 1 and `shared` must not be negative, got "
                f"{self.own!r} and {self.shared!r}; without own experts use `MMoE`."
            )
        num_tasks, own = self.num_tasks, self.num_tasks * self.own
        per_task, common = x, x
        if x.ndim == 3:
            per_task, common = x[:, :num_tasks], x[:, num_tasks]
        options = {"widths": self.widths, "dropout": self.dropout}
        private = "task_experts" if self.levels_above == 0 else "own_experts"
        repeated = per_task
        if x.ndim == 3:
            repeated = jnp.repeat(per_task, self.own, axis=1)
        outputs = Experts(own, **options, name=private)(repeated, train=train)
        if self.shared:
            experts = Experts(self.shared, **options, name="shared_experts")
            outputs = jnp.concatenate([outputs, experts(common, train=train)], axis=1)
        num_experts = own + self.shared
        owner = [t for t in range(num_tasks) for _ in range(self.own)]
        mask = tuple(
            tuple(o == t for o in owner) + (True,) * self.shared
            for t in range(num_tasks)
        )
        options = {"hidden": self.gate_hidden, "dropout": self.gate_dropout}
        # What a gate weighs reaches other tasks by the shared gate of the next level
        # but one, which reads the own experts of the next.
        private = "task_gates" if self.levels_above < 2 else "gates"
        gates = Gate(num_tasks, num_experts, mask, **options, name=private)
        weights = gates(per_task, train=train)
        if self.levels_above:
            gate = Gate(1, num_experts, **options, name="shared_gate")
            weights = jnp.concatenate([weights, gate(common, train=train)], axis=1)
        return mix(weights, outputs)


class PLE(nn.Module):
    """Progressive layered extraction: levels of `CGC`, then towers.

    With one level it is the published CGC model. Between levels a shared gate over all
    experts, also the tasks' own, lets them exchange what they found; in the last level
    a task sees its own and the shared experts only.

    Attributes:
      tasks: their names; at least one, all different.
      own: number of experts of each task's own in every level, at least 1.
      shared: number of shared experts in every level; with none, and one level, every
        task is a mixture of experts by itself.
      widths: by level, the widths of an expert's layers.
      gate_hidden: widths of the gates' hidden layers; none makes them linear.
      tower: widths of the towers' hidden layers.
      dropout: rate in experts and towers, in [0, 1); needs `rngs={"dropout": key}` in
        training.
      gate_dropout: rate of `mtjax.nn.gates.gate_dropout`, in [0, 1).

    Raises:
      ValueError: if tasks, experts or levels are missing.

    Example:
      >>> import jax
      >>> model = PLE(tasks=("click", "like"), widths=((16,), (8,)))
      >>> x = jnp.ones((3, 6))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> sorted(params["level_1"])
      ['shared_experts', 'task_experts', 'task_gates']
      >>> params["level_1"]["task_gates"]["kernel"].shape  # 2 own and 1 shared expert
      (2, 16, 3)

    References:
      Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for
      Personalized Recommendations, RecSys 2020, equations 1 to 7. Losses on different
      sample spaces are `mtjax.losses.masked_mean` of each task.
    """

    tasks: tuple[str, ...]
    own: int = 2
    shared: int = 1
    widths: tuple[tuple[int, ...], ...] = ((16,),)
    gate_hidden: tuple[int, ...] = ()
    tower: tuple[int, ...] = (8,)
    dropout: float = 0.0
    gate_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch features"] | Float[Array, "batch groups features"],
        *,
        train: bool = False,
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task.

        Args:
          x: what all experts and gates read, or a vector for those of every task and,
            behind them, one for the shared experts.
          train: whether to drop.

        Returns:
          One logit per example, by task.
        """
        check_tasks(self.tasks)
        if not self.widths:
            raise ValueError("`widths` must describe at least one level, got ().")
        h = x
        for i, widths in enumerate(self.widths):
            level = CGC(
                num_tasks=len(self.tasks),
                own=self.own,
                shared=self.shared,
                widths=widths,
                gate_hidden=self.gate_hidden,
                levels_above=len(self.widths) - 1 - i,
                dropout=self.dropout,
                gate_dropout=self.gate_dropout,
                name=f"level_{i}",
            )
            h = level(h, train=train)
        return Towers(self.tasks, self.tower, self.dropout, name="task_towers")(
            h, train=train
        )
