"""Multi-gate mixture of experts: all tasks share experts, each weighs them itself."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts
from mtjax.nn.gates import Gate, mix
from mtjax.nn.towers import Towers, check_tasks


class MMoE(nn.Module):
    r"""MMoE, with one gate for all tasks OMoE, with several levels ML-MMoE.

    .. math::
      y^t = h^t\Big(\sum_i g^t_i(x) \, E_i(x)\Big), \quad g^t(x) = softmax(W^t x)

    Attributes:
      tasks: their names; at least one, all different.
      num_experts: n of every level.
      widths: by level, the widths of an expert's layers. Every expert of a further
        level has a gate of its own over the level before; all gates read the input.
      tower: widths of the towers' hidden layers.
      single_gate: one gate for all tasks (OMoE).
      gate: makes the gates from `num_gates`, `num_experts` and `name`:
        `mtjax.nn.Gate`, `functools.partial(Gate, hidden=(128, 64), dropout=0.1)`, or
        `functools.partial(mtjax.nn.DSelectK, k=2)`.
      dropout: rate in experts and towers, in [0, 1); needs `rngs={"dropout": key}` in
        training, as a gate's dropout does.

    Raises:
      ValueError: if tasks, experts or levels are missing.

    Example:
      >>> import jax
      >>> model = MMoE(tasks=("click", "like"), num_experts=4)
      >>> x = jnp.ones((3, 6))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> sorted(params), params["task_gates"]["kernel"].shape
      (['experts_0', 'task_gates', 'task_towers'], (2, 6, 4))
      >>> model.apply({"params": params}, x)["like"].shape
      (3,)

    References:
      Modeling Task Relationships in Multi-task Learning with Multi-gate
      Mixture-of-Experts, KDD 2018, equations 6 and 7; one linear layer as the gate, as
      there. ML-MMoE: as a baseline of Progressive Layered Extraction, RecSys 2020.
    """

    tasks: tuple[str, ...]
    num_experts: int = 8
    widths: tuple[tuple[int, ...], ...] = ((16,),)
    tower: tuple[int, ...] = (8,)
    single_gate: bool = False
    gate: Callable[..., nn.Module] = Gate
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        check_tasks(self.tasks)
        if not self.widths:
            raise ValueError("`widths` must describe at least one level, got ().")
        n, h = self.num_experts, x
        for i, widths in enumerate(self.widths):
            if i:
                gates = self.gate(num_gates=n, num_experts=n, name=f"expert_gates_{i}")
                h = mix(gates(x, train=train), h)
            experts = Experts(n, widths, dropout=self.dropout, name=f"experts_{i}")
            h = experts(h, train=train)
        num_gates = 1 if self.single_gate else len(self.tasks)
        name = "gate" if self.single_gate else "task_gates"
        gates = self.gate(num_gates=num_gates, num_experts=n, name=name)
        h = mix(gates(x, train=train), h)
        h = jnp.broadcast_to(h, (h.shape[0], len(self.tasks), h.shape[-1]))
        return Towers(self.tasks, self.tower, self.dropout, name="task_towers")(
            h, train=train
        )
