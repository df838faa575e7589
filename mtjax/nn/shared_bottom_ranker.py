"""Hard parameter sharing as a ranker: one logit per task on one bottom."""

import flax.linen as nn
from jaxtyping import Array, Float

from mtjax.nn.towers import Towers, check_tasks


class SharedBottomRanker(nn.Module):
    """Layers that all tasks share and a tower for each: the baseline of rankers.

    With one task it is the single-task model. `SharedBottom` is the same idea for any
    encoder and any number of outputs.

    Attributes:
      tasks: their names; at least one, all different.
      widths: of the shared layers, at least one.
      tower: widths of the towers' hidden layers.
      dropout: rate everywhere, in [0, 1); needs `rngs={"dropout": key}` in training.

    Raises:
      ValueError: if tasks or layers are missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = SharedBottomRanker(tasks=("click", "like"))
      >>> x = jnp.ones((3, 6))
      >>> model.apply(model.init(jax.random.key(0), x), x)["click"].shape
      (3,)

    References:
      Multitask Learning, 1997; widths as the baseline of MMoE, KDD 2018.
    """

    tasks: tuple[str, ...]
    widths: tuple[int, ...] = (117,)
    tower: tuple[int, ...] = (8,)
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task."""
        check_tasks(self.tasks)
        if not self.widths:
            raise ValueError("`widths` must name at least one layer, got ().")
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, name=f"bottom_{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Towers(self.tasks, self.tower, self.dropout, name="task_towers")(
            x, train=train
        )
