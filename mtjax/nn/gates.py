"""Softmax gates of many tasks over subsets of experts, computed together."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from mtjax.nn.experts import Experts, kernel_init


def masked_softmax(
    logits: Float[Array, "*rows experts"], mask: Bool[Array | np.ndarray, "... experts"]
) -> Float[Array, "*rows experts"]:
    """Softmax over the entries whose mask is set; exactly 0 elsewhere.

    Masked entries are not in the normalisation: rows sum to 1. They have no gradient.

    Args:
      logits: any, also infinities where they are masked.
      mask: of the trailing axes of `logits`. A row without a set entry gives zeros.

    Returns:
      The weights.

    Example:
      >>> logits = jnp.array([[0.0, 0.0, 9.0]])
      >>> print(masked_softmax(logits, jnp.array([True, True, False])))
      [[0.5 0.5 0. ]]
    """
    mask = jnp.broadcast_to(jnp.asarray(mask), logits.shape)
    # A finite stand-in: a row of minus infinities would have NaN as its gradient.
    lowest = jnp.finfo(logits.dtype).min
    weights = jax.nn.softmax(jnp.where(mask, logits, lowest), axis=-1)
    return jnp.where(mask, weights, 0.0)


def gate_dropout(
    weights: Float[Array, "*rows experts"], rate: float, *, key: Key[Array, ""]
) -> Float[Array, "*rows experts"]:
    """Drops experts from gates and lets the others share what they had.

    It keeps a gate from settling on one expert early (polarisation).

    Args:
      weights: of gates; rows sum to 1.
      rate: probability of each weight to be dropped, in [0, 1).
      key: of the draws.

    Returns:
      Weights that sum to 1 again. Where every weight would go, all stay.

    Raises:
      ValueError: if `rate` is out of range.

    Example:
      >>> weights = jnp.full((1, 4), 0.25)
      >>> print(gate_dropout(weights, 0.5, key=jax.random.key(1)))
      [[0.33333334 0.         0.33333334 0.33333334]]

    References:
      Recommending What Video to Watch Next: A Multitask Ranking System, RecSys 2019.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"`rate` must be in [0, 1), got {rate!r}; 0 drops nothing.")
    kept = jnp.where(jax.random.bernoulli(key, 1 - rate, weights.shape), weights, 0.0)
    total = jnp.sum(kept, axis=-1, keepdims=True)
    return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1.0), weights)


def mix(
    weights: Float[Array, "batch gates experts"],
    outputs: Float[Array, "batch experts width"],
) -> Float[Array, "batch gates width"]:
    """The sums of expert outputs that gates ask for, as one einsum.

    Args:
      weights: of gates.
      outputs: of experts.

    Returns:
      One vector per example and gate.
    """
    return jnp.einsum("bgn,bnw->bgw", weights, outputs)


class Gate(nn.Module):
    r"""Softmax gates, one per task or group, over the experts that each may use.

    .. math:: w^g(x) = softmax_{i \in M_g}(V^g x)

    A gate has logits for its own experts only: the kernel has the shape `(gates,
    inputs, k)`, where k is the size of the largest subset. The weights are sown as
    `"gates"` in the collection `"intermediates"`, where
    `mtjax.analysis.expert_utilisation` finds them.

    Attributes:
      num_gates: number of gates.
      num_experts: number of experts.
      mask: by gate, for each expert whether the gate may use it; all if None.
      hidden: widths of ReLU layers before the logits; none makes gates linear.
      use_bias: whether logits have a bias.
      dropout: rate of `gate_dropout` in training, in [0, 1); needs
        `rngs={"dropout": key}`.

    Raises:
      ValueError: if there is no gate or no expert, or the mask does not fit or leaves
        a gate without experts.

    Example:
      >>> gate = Gate(2, 3, mask=((True, False, True), (False, True, True)))
      >>> x = jnp.zeros((1, 4))
      >>> variables = gate.init(jax.random.key(0), x)
      >>> print(gate.apply(variables, x))
      [[[0.5 0.  0.5]
        [0.  0.5 0.5]]]
    """

    num_gates: int
    num_experts: int
    mask: tuple[tuple[bool, ...], ...] | None = None
    hidden: tuple[int, ...] = ()
    use_bias: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch features"] | Float[Array, "batch gates features"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch gates experts"]:
        """The weight of every expert in every gate.

        Args:
          x: read by all gates, or one input for each of them.
          train: whether to drop.

        Returns:
          Non-negative weights that sum to 1 over the experts.
        """
        mask = self._checked_mask()
        if self.hidden:
            hidden = Experts(self.num_gates, self.hidden, observed=False, name="hidden")
            x = hidden(x)
        count = int(mask.sum(1).max())
        shape = (self.num_gates, x.shape[-1], count)
        kernel = self.param("kernel", kernel_init, shape)
        terms = "bd,gdk->bgk" if x.ndim == 2 else "bgd,gdk->bgk"
        logits = jnp.einsum(terms, x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[::2])
            logits = logits + bias[None]
        if not mask.all():
            # The k-th logit of a gate goes to its k-th expert.
            place = (np.cumsum(mask, axis=1) - 1)[:, None] == np.arange(count)[:, None]
            place = jnp.asarray(place & mask[:, None], logits.dtype)
            logits = jnp.einsum("bgk,gkn->bgn", logits, place, precision="highest")
        weights = masked_softmax(logits, mask)
        if train and self.dropout:
            weights = gate_dropout(weights, self.dropout, key=self.make_rng("dropout"))
        self.sow("intermediates", "gates", weights)
        return weights

    def _checked_mask(self) -> np.ndarray:
        shape = (self.num_gates, self.num_experts)
        if min(shape) < 1:
            raise ValueError(
                "`num_gates` and `num_experts` must be at least 1, got "
                f"{self.num_gates!r} and {self.num_experts!r}."
            )
        mask = np.ones(shape, bool) if self.mask is None else np.array(self.mask, bool)
        if mask.shape != shape:
            raise ValueError(
                f"`mask` must have one row per gate and one entry per expert, {shape}, "
                f"got {mask.shape}."
            )
        if not mask.any(axis=1).all():
            empty = np.flatnonzero(~mask.any(axis=1)).tolist()
            raise ValueError(
                f"`mask` must let every gate use an expert, got none for gates {empty}."
            )
        return mask
