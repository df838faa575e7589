"""Adaptive information transfer along a chain of tasks, such as click then purchase."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts
from mtjax.nn.towers import Towers, check_tasks


class InformationTransfer(nn.Module):
    r"""Weighs what the task before says against what a task sees itself.

    .. math:: q = \sum_{u \in \{p, z\}} a_u V_u, \quad
        a = softmax_u\left(\frac{\langle K_u, Q_u \rangle}{\sqrt k}\right)

    V, K and Q are linear maps of u without a bias. The two weights are sown as
    `"transfer"` in the collection `"intermediates"`.

    Attributes:
      width: k, of V, K and Q.
    """

    width: int

    @nn.compact
    def __call__(
        self, p: Float[Array, "batch features"], z: Float[Array, "batch features"]
    ) -> Float[Array, "batch width"]:
        """The representation of a task.

        Args:
          p: from the task before.
          z: the task's own.

        Returns:
          q.
        """
        u = jnp.stack([p, z], axis=1)
        value, key, query = (
            nn.Dense(self.width, use_bias=False, name=name)(u)
            for name in ("value", "key", "query")
        )
        scores = jnp.sum(key * query, axis=-1) / self.width**0.5
        a = jax.nn.softmax(scores, axis=-1)
        self.sow("intermediates", "transfer", a)
        return jnp.einsum("bu,bud->bd", a, value)


class AITM(nn.Module):
    r"""Adaptive information transfer multi-task network.

    .. math:: q_1 = z_1, \quad q_t = AIT(g_{t-1}(q_{t-1}), z_t), \quad
        y^t = h^t(q_t), \quad z_t = f_t(x)

    Train it with `mtjax.losses.label_chain_penalty` beside the task losses. What only
    the last task reaches is in modules named `task_...`, see `mtjax.nn.is_shared`.

    Attributes:
      tasks: names in the order of the chain, so that each needs the one before; at
        least one, all different.
      bottom: widths of every task's bottom; the last is that of the transfer.
      tower: widths of the towers' hidden layers.
      dropout: rate in bottoms and towers, in [0, 1); needs `rngs={"dropout": key}` in
        training. The authors' code has another one for every layer:
      bottom_dropout: one rate for each layer of a bottom, in place of `dropout`.

    Raises:
      ValueError: if tasks or layers are missing.

    Example:
      >>> model = AITM(tasks=("click", "purchase"), bottom=(8, 4))
      >>> x = jnp.ones((3, 6))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> sorted(params)[:3]
      ['bottom_click', 'task_bottom_purchase', 'task_info_click']

    References:
      Modeling the Sequential Dependence among Audience Multi-step Conversions with
      Multi-task Learning in Targeted Display Advertising, KDD 2021, equations 1 to 7.
    """

    tasks: tuple[str, ...]
    bottom: tuple[int, ...] = (128, 64, 32)
    tower: tuple[int, ...] = ()
    dropout: float = 0.0
    bottom_dropout: tuple[float, ...] | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        check_tasks(self.tasks)
        if not self.bottom:
            raise ValueError("`bottom` must name at least one layer, got ().")
        width, before, q = self.bottom[-1], None, []
        rates = self.dropout if self.bottom_dropout is None else self.bottom_dropout
        for task in self.tasks:
            prefix = "task_" if task == self.tasks[-1] else ""
            bottom = Experts(
                1,
                self.bottom,
                dropout=rates,
                observed=False,
                name=f"{prefix}bottom_{task}",
            )
            z = bottom(x, train=train)[:, 0]
            if before is not None:
                info = nn.Dense(width, name=f"{prefix}info_{before}")
                p = nn.relu(info(q[-1]))
                z = InformationTransfer(width, name=f"{prefix}transfer_{task}")(p, z)
            q.append(z)
            before = task
        return Towers(self.tasks, self.tower, self.dropout, name="task_towers")(
            jnp.stack(q, axis=1), train=train
        )
