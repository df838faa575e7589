"""Experts whose outputs are normalised, each with statistics of its own."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from mtjax.nn.experts import Experts


class NormalisedExperts(nn.Module):
    r"""`Experts` with batch norm and Swish behind the last layer.

    .. math:: E(u) = Swish(BN(W u + b)), \quad Swish(z) = z \, \sigma(z)

    The outputs of all experts have one distribution, so that gates can compare them,
    and do not die as those of ReLU do. In inference the statistics are running
    averages: an example's output does not depend on the others in its batch.

    Attributes:
      num_experts: number of experts, at least 1.
      widths: widths of the layers, at least one; ReLU between them.
      activation: behind the norm.
      norm: False leaves the norm out.
      momentum: of the running averages, in [0, 1): the weight of the old value.
      eps: added to variances.
      axis_name: inside `shard_map`, the axis over which batches are split: statistics
        are then those of the whole batch; if None, those of each device's part. Under
        `jit` with a mesh they are always those of the whole batch.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> experts = NormalisedExperts(num_experts=4, widths=(8,))
      >>> x = jnp.ones((5, 6))
      >>> variables = experts.init(jax.random.key(0), x)
      >>> variables["batch_stats"]["norm"]["mean"].shape
      (4, 8)
      >>> y, state = experts.apply(variables, x, train=True, mutable=["batch_stats"])
      >>> print(y[0, 0, :3])  # all examples are alike
      [0. 0. 0.]

    References:
      HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou, KDD
      2025, expert normalisation and Swish; eps as in a public re-implementation.
    """

    num_experts: int
    widths: tuple[int, ...] = (16,)
    activation: Callable[[Array], Array] = nn.swish
    norm: bool = True
    momentum: float = 0.9
    eps: float = 1e-3
    axis_name: str | None = None

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
          train: whether to normalise with this batch, of which the running averages in
            `"batch_stats"` take note.

        Returns:
          One vector per example and expert.

        Raises:
          ValueError: as `Experts`, or if `momentum` is out of range.
        """
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum!r}.")
        experts = Experts(
            self.num_experts,
            self.widths,
            activate_output=False,
            observed=False,
            name="dense",
        )
        x = experts(x)
        if self.norm:
            # Linen's own annotation knows single axes only.
            per_expert: Any = (-2, -1)
            norm = nn.BatchNorm(
                use_running_average=not train,
                axis=per_expert,
                momentum=self.momentum,
                epsilon=self.eps,
                axis_name=self.axis_name,
                # The fast one loses digits where means are large.
                use_fast_variance=False,
                name="norm",
            )
            x = norm(x)
        x = self.activation(x)
        self.sow("intermediates", "experts", x)
        return x
