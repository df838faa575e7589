"""Weights of whole fields, from all fields: squeeze and excitation."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

_GATES = {
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "double_sigmoid": lambda x: 2.0 * nn.sigmoid(x),
}


class SENet(nn.Module):
    r"""Multiplies every field by a weight that depends on all of them.

    .. math:: V_f = A_f e_f, \quad A = g(W_2 \, relu(W_1 Z)), \quad Z_f = mean_k(e_f)

    without biases. The weights are sown as `"field_weights"` in the collection
    `"intermediates"`.

    Attributes:
      gate: :math:`g`; `"relu"` is FiBiNET's and drops fields, `"sigmoid"` is below 1,
        and `"double_sigmoid"`, twice the sigmoid, is 1 where logits are zero.
      reduction: how many times fewer units than fields the hidden layer has, at least
        1; one unit remains in any case.

    Raises:
      ValueError: if the gate is unknown or `reduction` below 1.

    Example:
      >>> import jax
      >>> fields = jnp.ones((2, 6, 4))
      >>> variables = SENet().init(jax.random.key(0), fields)
      >>> {name: p["kernel"].shape for name, p in variables["params"].items()}
      {'squeeze': (6, 2), 'excite': (2, 6)}
      >>> SENet().apply(variables, fields).shape
      (2, 6, 4)

    References:
      FiBiNET: Combining Feature Importance and Bilinear Feature Interaction for
      Click-Through Rate Prediction, RecSys 2019, section 3.3.
    """

    gate: str = "relu"
    reduction: int = 3

    @nn.compact
    def __call__(
        self, fields: Float[Array, "batch fields width"]
    ) -> Float[Array, "batch fields width"]:
        """The weighted fields."""
        if self.gate not in _GATES:
            raise ValueError(
                f"`gate` must be one of {tuple(_GATES)}, got {self.gate!r}."
            )
        if self.reduction < 1:
            raise ValueError(f"`reduction` must be at least 1, got {self.reduction!r}.")
        count = fields.shape[1]
        hidden = max(1, count // self.reduction)
        z = jnp.mean(fields, axis=-1)
        z = nn.relu(nn.Dense(hidden, use_bias=False, name="squeeze")(z))
        logits = nn.Dense(count, use_bias=False, name="excite")(z)
        weights = _GATES[self.gate](logits)
        self.sow("intermediates", "field_weights", weights)
        return fields * weights[:, :, None]
