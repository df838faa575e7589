"""Gates on the features that groups of experts read."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts, kernel_init


class FeatureGates(nn.Module):
    r"""Weighs the features of each group's input between 0 and 2; starts with 1.

    .. math::
      \tilde u = u \odot \sum_l softmax(u W)_l \; 2 \sigma(u B_l A_l), \quad
      B_l \in R^{d \times r}, \; A_l \in R^{r \times d}

    or, without a rank, :math:`u \odot 2 \sigma(MLP(u))` with one hidden layer as wide
    as u. :math:`A_l` and the last layer of the MLP start at 0.

    Attributes:
      num_groups: number of inputs, one per group.
      rank: r, at least 1; None for the MLP.
      adapters: L, at least 1.

    Raises:
      ValueError: if the rank or the number of adapters is out of range.

    Example:
      >>> import jax
      >>> gates = FeatureGates(num_groups=2, rank=3)
      >>> x = jnp.arange(8.0).reshape(1, 2, 4)
      >>> print(gates.apply(gates.init(jax.random.key(0), x), x)[0, 1])
      [4. 5. 6. 7.]

    References:
      HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou, KDD
      2025, feature-gate. A public re-implementation mixes the logits and omits the
      factor 2, which halves every feature at the start.
    """

    num_groups: int
    rank: int | None = 64
    adapters: int = 2

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch groups features"]
    ) -> Float[Array, "batch groups features"]:
        """The inputs, weighed."""
        if self.adapters < 1 or (self.rank is not None and self.rank < 1):
            raise ValueError(
                "`rank` and `adapters` must be at least 1, got "
                f"{self.rank!r} and {self.adapters!r}."
            )
        zeros, features = nn.initializers.zeros, x.shape[-1]
        if self.rank is None:
            hidden = Experts(
                self.num_groups, (features,), observed=False, name="hidden"
            )
            shape = (self.num_groups, features, features)
            kernel = self.param("kernel", zeros, shape)
            bias = self.param("bias", zeros, shape[::2])
            logits = jnp.einsum("bge,ged->bgd", hidden(x), kernel) + bias[None]
            return x * 2 * nn.sigmoid(logits)
        shape = (self.num_groups, features, self.adapters, self.rank)
        lecun = nn.initializers.lecun_normal(in_axis=1, batch_axis=(0, 2))
        down = self.param("down", lecun, shape)
        up = self.param("up", zeros, (self.num_groups, *shape[2:], features))
        mixing = self.param("mixing", kernel_init, shape[:3])
        shares = nn.softmax(jnp.einsum("bgd,gdl->bgl", x, mixing))
        low = jnp.einsum("bgd,gdlr->bglr", x, down)
        gates = 2 * nn.sigmoid(jnp.einsum("bglr,glrd->bgld", low, up))
        return x * jnp.einsum("bgl,bgld->bgd", shares, gates)
