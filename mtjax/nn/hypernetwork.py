"""Weights that a small network makes from a condition, such as a task's embedding."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float

Initializer = Callable[..., Array]


class Hypernetwork(nn.Module):
    r"""Arrays of given shapes as a function of a condition.

    .. math:: \theta_n(c) = W_n \, MLP(c) + b_n

    The heads :math:`W_n` start at zero and :math:`b_n` as the arrays would start if
    they were parameters: at first every condition gets the same.

    Attributes:
      shapes: of the arrays, by name; at least one.
      start: initialisers, by name; zeros where there is none.
      hidden: widths of the MLP's ReLU layers.

    Raises:
      ValueError: if there is no array, or `start` names an unknown one.

    Example:
      >>> import jax
      >>> shapes = {"scale": (3,), "shift": (3,)}
      >>> hypernetwork = Hypernetwork(shapes, start={"scale": nn.initializers.ones})
      >>> conditions = jnp.ones((2, 5))
      >>> variables = hypernetwork.init(jax.random.key(0), conditions)
      >>> print(hypernetwork.apply(variables, conditions)["scale"])
      [[1. 1. 1.]
       [1. 1. 1.]]

    References:
      HyperNetworks, ICLR 2017.
    """

    shapes: Mapping[str, tuple[int, ...]]
    start: Mapping[str, Initializer] = FrozenDict()
    hidden: tuple[int, ...] = (32,)

    @nn.compact
    def __call__(
        self, condition: Float[Array, "*conditions features"]
    ) -> dict[str, Float[Array, "..."]]:
        """The arrays, with the leading axes of the conditions."""
        if not self.shapes or not set(self.start) <= set(self.shapes):
            raise ValueError(
                "`shapes` must name at least one array and all those of `start`, got "
                f"{sorted(self.shapes)} and {sorted(self.start)}."
            )
        h = condition
        for i, width in enumerate(self.hidden):
            h = nn.relu(nn.Dense(width, name=f"hidden_{i}")(h))
        arrays = {}
        for name, shape in self.shapes.items():
            start = self.start.get(name, nn.initializers.zeros)
            head = nn.Dense(
                int(np.prod(shape)),
                kernel_init=nn.initializers.zeros,
                bias_init=_flat(start, tuple(shape)),
                name=name,
            )
            arrays[name] = head(h).reshape(*condition.shape[:-1], *shape)
        return arrays


class HyperDense(nn.Module):
    """A dense layer whose weights a hypernetwork makes from a condition.

    Attributes:
      features: number of outputs.
      rank: of the kernel, made as a product of two factors; None makes all of it.
      hidden: widths of the hypernetwork's ReLU layers.

    Raises:
      ValueError: if `rank` is below 1.

    Example:
      >>> import jax
      >>> layer = HyperDense(features=4, rank=2)
      >>> x, conditions = jnp.ones((3, 6)), jnp.ones((3, 5))
      >>> variables = layer.init(jax.random.key(0), x, conditions)
      >>> layer.apply(variables, x, conditions).shape
      (3, 4)
    """

    features: int
    rank: int | None = None
    hidden: tuple[int, ...] = (32,)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch inputs"],
        condition: Float[Array, " features"] | Float[Array, "batch features"],
    ) -> Float[Array, "batch outputs"]:
        """Applies the layer.

        Args:
          x: inputs.
          condition: one for the batch, or one for each example.

        Returns:
          Outputs, without an activation.
        """
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"`rank` must be at least 1, got {self.rank!r}; None for a full kernel."
            )
        inputs, outputs, init = (
            x.shape[-1],
            self.features,
            nn.initializers.lecun_normal(),
        )
        shapes = {"kernel": (inputs, outputs)}
        if self.rank is not None:
            shapes = {"down": (inputs, self.rank), "up": (self.rank, outputs)}
        start = dict.fromkeys(shapes, init)
        hypernetwork = Hypernetwork(
            {**shapes, "bias": (outputs,)}, start, self.hidden, name="hypernetwork"
        )
        made = hypernetwork(condition)
        terms = "bi,io->bo" if condition.ndim == 1 else "bi,bio->bo"
        for name in shapes:
            x = jnp.einsum(terms, x, made[name])
        bias = made["bias"]
        return x + (bias[None] if condition.ndim == 1 else bias)


def _flat(init: Initializer, shape: tuple[int, ...]) -> Initializer:
    """An initialiser of a vector that holds an array of `shape`."""
    return lambda key, _, dtype=jnp.float32: init(key, shape, dtype).reshape(-1)
