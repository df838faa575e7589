"""Cross-stitch networks: a network per task, and mixing after every layer."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts
from mtjax.nn.towers import Towers, check_tasks


class CrossStitch(nn.Module):
    r"""A column of layers for every task, whose outputs are mixed after each layer.

    .. math:: \tilde z_t = \sum_s A_{ts} z_s

    A starts with `keep` on its diagonal and equal shares of the rest beside it. The
    paper gives it a learning rate 10 to 100 times that of the layers:
    `optax.multi_transform` on the leaves `stitch_0`, … and `task_stitch`, the last.

    Attributes:
      tasks: their names; at least one, all different.
      widths: of the layers of a column, at least one.
      tower: widths of the towers' hidden layers.
      per_channel: one A for every channel, as in the paper; else one per layer.
      keep: initial diagonal.
      dropout: rate in columns and towers, in [0, 1); needs `rngs={"dropout": key}` in
        training.

    Raises:
      ValueError: if tasks or layers are missing.

    Example:
      >>> import jax
      >>> model = CrossStitch(tasks=("click", "like"), widths=(8, 4))
      >>> x = jnp.ones((3, 6))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> print(params["stitch_0"])
      [[0.9 0.1]
       [0.1 0.9]]

    References:
      Cross-stitch Networks for Multi-task Learning, CVPR 2016.
    """

    tasks: tuple[str, ...]
    widths: tuple[int, ...] = (16,)
    tower: tuple[int, ...] = (8,)
    per_channel: bool = False
    keep: float = 0.9
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        check_tasks(self.tasks)
        if not self.widths:
            raise ValueError("`widths` must name at least one layer, got ().")
        num_tasks = len(self.tasks)
        rest = (1 - self.keep) / max(1, num_tasks - 1)
        start = np.where(np.eye(num_tasks), self.keep if num_tasks > 1 else 1.0, rest)
        h = x
        for i, width in enumerate(self.widths):
            layer = Experts(
                num_tasks,
                (width,),
                dropout=self.dropout,
                observed=False,
                name=f"columns_{i}",
            )
            h = layer(h, train=train)
            shape = (num_tasks, num_tasks) + (width,) * self.per_channel
            init = lambda key, shape: jnp.broadcast_to(
                start.reshape(start.shape + (1,) * (len(shape) - 2)), shape
            ).astype(jnp.float32)
            # The last rows reach one task each.
            last = i == len(self.widths) - 1
            name = "task_stitch" if last else f"stitch_{i}"
            stitch = self.param(name, init, shape)
            terms = "tsw,bsw->btw" if self.per_channel else "ts,bsw->btw"
            h = jnp.einsum(terms, stitch, h)
        return Towers(self.tasks, self.tower, self.dropout, name="task_towers")(
            h, train=train
        )
