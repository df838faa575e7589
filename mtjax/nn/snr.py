"""Sub-network routing: which sub-networks feed which is learned, and kept sparse."""

import functools
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts
from mtjax.nn.hard_concrete import hard_concrete, open_probability
from mtjax.nn.towers import Towers, check_tasks


class Routing(nn.Module):
    r"""Connections between two levels of sub-networks, each switched by a gate.

    .. math:: u_j = \sum_i z_{ij} W_{ij} h_i \quad or \quad u_j = \sum_i z_{ij} h_i

    Attributes:
      num_outputs: number of sub-networks that are fed.
      mode: `"transform"` (SNR-Trans) or `"average"` (SNR-Aver).
      temperature: of the hard concrete gates z, positive.
    """

    num_outputs: int
    mode: Literal["transform", "average"] = "transform"
    temperature: float = 2 / 3

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch inputs width"], *, train: bool = False
    ) -> Float[Array, "batch outputs width"]:
        """What every sub-network of the next level reads."""
        n, width = h.shape[1:]
        # Gates start at 0 log-odds with a little noise, so that they may part.
        log_alpha = self.param(
            "log_alpha", nn.initializers.normal(0.01), (n, self.num_outputs)
        )
        key = self.make_rng("dropout") if train else None
        z = hard_concrete(log_alpha, temperature=self.temperature, key=key)
        opened = jnp.sum(open_probability(log_alpha, temperature=self.temperature))
        self.sow("losses", "open_connections", opened)
        if self.mode == "average":
            return jnp.einsum("bid,ij->bjd", h, z)
        # Fan-in counts all that is summed.
        init = nn.initializers.lecun_normal(in_axis=(0, 2), out_axis=3, batch_axis=1)
        kernel = self.param("kernel", init, (n, self.num_outputs, width, width))
        return jnp.einsum("bid,ijde->bje", h, kernel * z[:, :, None, None])


class SNR(nn.Module):
    r"""Sub-network routing, of the kinds SNR-Trans and SNR-Aver.

    Levels of sub-networks; every one may read every one of the level before, and every
    tower those of the last level, through hard concrete gates. The expected number of
    open connections is sown, per routing, as `"open_connections"` in the collection
    `"losses"`: add their sum times :math:`\lambda` to the loss.

    Attributes:
      tasks: their names; at least one, all different.
      num_experts: number of sub-networks in every level, at least 1.
      widths: by level, the widths of a sub-network's layers.
      tower: widths of the towers' hidden layers.
      mode: `"transform"` or `"average"`, see `Routing`.
      temperature: of the gates; the paper also uses 0.9.
      dropout: rate in sub-networks and towers, in [0, 1). Training needs
        `rngs={"dropout": key}` for the gates in any case.

    Raises:
      ValueError: if tasks, sub-networks or levels are missing, or `mode` is unknown.

    Example:
      >>> import jax
      >>> model = SNR(tasks=("click", "like"), num_experts=3)
      >>> x = jnp.ones((4, 6))
      >>> variables = model.init(jax.random.key(0), x)
      >>> logits, state = model.apply(
      ...     {"params": variables["params"]}, x, mutable=["losses"]
      ... )
      >>> sorted(state["losses"])
      ['routing_1', 'task_routing']

    References:
      SNR: Sub-Network Routing for Flexible Parameter Sharing in Multi-Task Learning,
      AAAI 2019; gates of Learning Sparse Neural Networks through L0 Regularization,
      ICLR 2018.
    """

    tasks: tuple[str, ...]
    num_experts: int = 4
    widths: tuple[tuple[int, ...], ...] = ((16,), (16,))
    tower: tuple[int, ...] = (8,)
    mode: Literal["transform", "average"] = "transform"
    temperature: float = 2 / 3
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        check_tasks(self.tasks)
        if not self.widths:
            raise ValueError("`widths` must describe at least one level, got ().")
        if self.mode not in ("transform", "average"):
            raise ValueError(
                f'`mode` must be "transform" or "average", got {self.mode!r}.'
            )
        routing_to = functools.partial(
            Routing, mode=self.mode, temperature=self.temperature
        )
        h = x
        for i, widths in enumerate(self.widths):
            if i:
                routing = routing_to(self.num_experts, name=f"routing_{i}")
                h = routing(h, train=train)
            experts = Experts(
                self.num_experts, widths, dropout=self.dropout, name=f"experts_{i}"
            )
            h = experts(h, train=train)
        routing = routing_to(len(self.tasks), name="task_routing")
        h = routing(h, train=train)
        return Towers(self.tasks, self.tower, self.dropout, name="task_towers")(
            h, train=train
        )
