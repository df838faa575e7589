"""Many small networks of one shape, computed together."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# One expert's fan-in, not that of all of them.
kernel_init = nn.initializers.lecun_normal(batch_axis=(0,))


class Experts(nn.Module):
    """Experts of one shape: every layer of all of them is a single einsum.

    Kernels have the shape `(experts, inputs, width)` and biases `(experts, width)`;
    each expert starts as a `flax.linen.Dense` of its own would.

    Attributes:
      num_experts: number of experts, at least 1.
      widths: widths of the layers, at least one.
      activation: after every layer.
      activate_output: False leaves the last layer linear, for a norm or an activation
        of your own behind it.
      dropout: rate after every activation, in [0, 1), or one rate per layer; needs
        `rngs={"dropout": key}` in training.
      observed: whether outputs are sown, as `"experts"` in the collection
        `"intermediates"`, where `mtjax.analysis.expert_utilisation` finds them.

    Raises:
      ValueError: if there is no expert or no layer, rates are not one per layer, or
        inputs are of another number of experts.

    Example:
      >>> import jax
      >>> experts = Experts(num_experts=4, widths=(8, 3))
      >>> x = jnp.ones((5, 6))
      >>> variables = experts.init(jax.random.key(0), x)
      >>> variables["params"]["kernel_0"].shape, experts.apply(variables, x).shape
      ((4, 6, 8), (5, 4, 3))
    """

    num_experts: int
    widths: tuple[int, ...] = (16,)
    activation: Callable[[Array], Array] = nn.relu
    activate_output: bool = True
    dropout: float | tuple[float, ...] = 0.0
    observed: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch features"] | Float[Array, "batch experts features"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch experts width"]:
        """What every expert says of every example.

        Args:
          x: read by all experts, or one input for each of them.
          train: whether to drop.

        Returns:
          One vector per example and expert.
        """
        if self.num_experts < 1:
            raise ValueError(
                f"`num_experts` must be at least 1, got {self.num_experts!r}; leave "
                "the module out where there is no expert."
            )
        if not self.widths:
            raise ValueError("`widths` must name at least one layer, got ().")
        if x.ndim == 3 and x.shape[1] != self.num_experts:
            raise ValueError(
                "`x` must hold one input for each of the `num_experts` experts, "
                f"{self.num_experts}, got {x.shape[1]}; give a matrix (batch, "
                "features) to let all experts read the same."
            )
        rates = self.dropout
        if not isinstance(rates, tuple):
            rates = (rates,) * len(self.widths)
        if len(rates) != len(self.widths):
            raise ValueError(
                f"`dropout` must be one rate, or one for each of {len(self.widths)} "
                f"`widths`, got {rates!r}."
            )
        for i, (width, rate) in enumerate(zip(self.widths, rates)):
            shape = (self.num_experts, x.shape[-1], width)
            kernel = self.param(f"kernel_{i}", kernel_init, shape)
            bias = self.param(f"bias_{i}", nn.initializers.zeros, shape[::2])
            terms = "bd,ndw->bnw" if x.ndim == 2 else "bnd,ndw->bnw"
            x = jnp.einsum(terms, x, kernel) + bias[None]
            if i < len(self.widths) - 1 or self.activate_output:
                x = self.activation(x)
                x = nn.Dropout(rate, deterministic=not train)(x)
        if self.observed:
            self.sow("intermediates", "experts", x)
        return x
