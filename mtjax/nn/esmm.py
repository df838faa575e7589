"""Entire-space multi-task model: clicks, and conversions of what is clicked."""

import flax.linen as nn
from jaxtyping import Array, Float

from mtjax.nn.towers import Towers, check_tasks


class ESMM(nn.Module):
    """Two networks on one embedding: P(click) and P(conversion | click).

    What makes it ESMM is how it is trained, `mtjax.losses.entire_space_losses`: on all
    impressions, the second only by the product of both. With an imputation it is the
    model of ESCM2, see `mtjax.losses.doubly_robust_loss`.

    Attributes:
      tasks: the names of click and conversion, in this order.
      hidden: widths of the networks' hidden layers.
      imputation: whether a third network says `"imputation"`: its softplus is the
        loss of the conversion that is expected where nothing was clicked.
      dropout: rate, in [0, 1); needs `rngs={"dropout": key}` in training.

    Raises:
      ValueError: unless there are two tasks.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = ESMM(hidden=(8,))
      >>> x = jnp.ones((3, 6))
      >>> params = model.init(jax.random.key(0), x)
      >>> {t: y.shape for t, y in model.apply(params, x).items()}
      {'click': (3,), 'conversion': (3,)}

    References:
      Entire Space Multi-Task Model, SIGIR 2018. ESCM2: Entire Space Counterfactual
      Multi-Task Model for Post-Click Conversion Rate Estimation, SIGIR 2022.
    """

    tasks: tuple[str, ...] = ("click", "conversion")
    hidden: tuple[int, ...] = (360, 200, 80)
    imputation: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of both, and what the third network says."""
        check_tasks(self.tasks)
        if len(self.tasks) != 2:
            raise ValueError(
                "`tasks` must be two, a click and the conversion after it, got "
                f"{self.tasks!r}; chains of more steps are for `AITM`."
            )
        outputs = self.tasks + ("imputation",) * self.imputation
        towers = Towers(outputs, self.hidden, self.dropout, name="towers")
        return towers(x, train=train)
