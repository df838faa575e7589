"""Adaptive task-to-task fusion: gates over all experts, and one's own beside them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts
from mtjax.nn.gates import Gate, mix
from mtjax.nn.towers import Towers, check_tasks


class AdaTT(nn.Module):
    r"""Levels of experts of every task, fused by gates with a native residual.

    .. math:: z^l_t = softmax(W^l_t z^{l-1}_t) \, E^l + v^l_t E^l_t, \quad z^0_t = x

    :math:`E^l` are the outputs of all experts of a level, :math:`E^l_t` the task's own.

    Attributes:
      tasks: their names; at least one, all different.
      own: m, number of experts of each task's own in every level, at least 1. Several
        are summed with learned factors v, which are not normalised; a single one is
        added as it is.
      shared: number of experts of a shared module, which has a gate and a residual of
        its own in all levels but the last; 0 leaves it out.
      widths: by level, the widths of an expert's layers.
      tower: widths of the towers' hidden layers.
      residual: False removes the native residual, for ablations.
      dropout: rate in experts and towers, in [0, 1); needs `rngs={"dropout": key}` in
        training.

    Raises:
      ValueError: if tasks, experts or levels are missing.

    Example:
      >>> model = AdaTT(tasks=("click", "like"), own=2, widths=((16,), (8,)))
      >>> x = jnp.ones((3, 6))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> params["residual_0"].shape, params["task_gates"]["kernel"].shape
      ((2, 2), (2, 16, 4))

    References:
      AdaTT: Adaptive Task-to-Task Fusion Network for Multitask Learning in
      Recommendations, KDD 2023, equations 1 to 5.
    """

    tasks: tuple[str, ...]
    own: int = 1
    shared: int = 0
    widths: tuple[tuple[int, ...], ...] = ((16,), (16,))
    tower: tuple[int, ...] = (8,)
    residual: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        check_tasks(self.tasks)
        if self.own < 1 or self.shared < 0 or not self.widths:
            raise ValueError(
                "`own` must be at least 1, `shared` not negative, and `widths` must "
                f"describe a level, got {self.own!r}, {self.shared!r} and "
                f"{self.widths!r}."
            )
        h = x
        for i, widths in enumerate(self.widths):
            h = self._level(i, widths, h, train)
        return Towers(self.tasks, self.tower, self.dropout, name="task_towers")(
            h, train=train
        )

    def _level(self, i: int, widths: tuple[int, ...], h: Array, train: bool) -> Array:
        """From one input of every module, or one of all, to one output of every."""
        last = i == len(self.widths) - 1
        num_tasks, num_own = len(self.tasks), len(self.tasks) * self.own
        num_experts = num_own + self.shared
        num_modules = num_tasks + (self.shared > 0 and not last)
        owner = [t for t in range(num_tasks) for _ in range(self.own)]
        owner = np.array(owner + [num_tasks] * self.shared)
        experts = Experts(
            num_experts, widths, dropout=self.dropout, name=f"experts_{i}"
        )
        outputs = experts(h if h.ndim == 2 else h[:, owner], train=train)
        name = "task_gates" if last else f"gates_{i}"
        gates = Gate(num_modules, num_experts, name=name)
        z = mix(gates(h if h.ndim == 2 else h[:, :num_modules]), outputs)
        if not self.residual:
            return z
        native = [
            self._native(
                "task_residual" if last else f"residual_{i}",
                outputs[:, :num_own].reshape(h.shape[0], num_tasks, self.own, -1),
            )
        ]
        if num_modules > num_tasks:
            native.append(
                self._native(f"shared_residual_{i}", outputs[:, None, num_own:])
            )
        return z + jnp.concatenate(native, axis=1)

    def _native(
        self, name: str, outputs: Float[Array, "batch modules own width"]
    ) -> Float[Array, "batch modules width"]:
        """What modules keep of their own experts."""
        modules, own = outputs.shape[1:3]
        if own == 1:
            return outputs[:, :, 0]
        bound = (1 / own) ** 0.5
        init = lambda key, shape: jax.random.uniform(
            key, shape, minval=-bound, maxval=bound
        )
        v = self.param(name, init, (modules, own))
        return jnp.einsum("mk,bmkw->bmw", v, outputs)
