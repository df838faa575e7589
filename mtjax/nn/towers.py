"""What stands on top of a ranker: one small network per task, which says one logit."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float


def check_tasks(tasks: Sequence[str]) -> None:
    """Checks names of tasks.

    Args:
      tasks: at least one, all different.

    Raises:
      ValueError: if not so.

    Example:
      >>> check_tasks(("click", "click"))
      Traceback (most recent call last):
      ...
      ValueError: `tasks` must differ from each other, got ('click', 'click').
    """
    if not tasks:
        raise ValueError("`tasks` must name at least one task, got none.")
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"`tasks` must differ from each other, got {tuple(tasks)!r}.")


class Tower(nn.Module):
    """Dense layers with ReLU, and a linear one to a single logit.

    Attributes:
      hidden: widths of the layers before the logit; none makes the tower linear.
      dropout: rate after every hidden layer, in [0, 1).
    """

    hidden: tuple[int, ...] = (8,)
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> Float[Array, " batch"]:
        """The logit of every example."""
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, name=f"hidden_{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1, name="logit")(x)[:, 0]


class Towers(nn.Module):
    """One tower per task.

    Towers do not share an array: what the gradient engines call task-specific is told
    from which loss reaches which array, and an absent task's tower and its moments stay
    as they are.

    Attributes:
      tasks: their names; at least one, all different.
      hidden: see `Tower`.
      dropout: see `Tower`; needs `rngs={"dropout": key}` in training.

    Raises:
      ValueError: if the tasks are not so, or inputs are of another number of tasks.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> towers = Towers(("click", "like"))
      >>> h = jnp.ones((3, 2, 5))
      >>> variables = towers.init(jax.random.key(0), h)
      >>> {t: y.shape for t, y in towers.apply(variables, h).items()}
      {'click': (3,), 'like': (3,)}
      >>> sorted(variables["params"]["like"])
      ['hidden_0', 'logit']
    """

    tasks: tuple[str, ...]
    hidden: tuple[int, ...] = (8,)
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch features"] | Float[Array, "batch tasks features"],
        *,
        train: bool = False,
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task.

        Args:
          x: read by all towers, or one input for each of them, in the order of `tasks`.
          train: whether to drop.

        Returns:
          One logit per example, by task.
        """
        check_tasks(self.tasks)
        if x.ndim == 3 and x.shape[1] != len(self.tasks):
            raise ValueError(
                f"`x` must hold one input for each of the {len(self.tasks)} `tasks`, "
                f"got {x.shape[1]}."
            )
        inputs = [x] * len(self.tasks) if x.ndim == 2 else list(x.swapaxes(0, 1))
        return {
            task: Tower(self.hidden, self.dropout, name=task)(h, train=train)
            for task, h in zip(self.tasks, inputs)
        }
