"""Binary Concrete variables: differentiable coin flips, for gates and masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def binary_concrete(
    logits: Float[Array, "*shape"],
    temperature: float | Float[Array, ""] = 0.5,
    *,
    hard: bool = False,
    key: Key[Array, ""],
) -> Float[Array, "*shape"]:
    r"""Draws a number between 0 and 1 per logit, mostly near one of them.

    .. math:: m = \sigma\left( \frac{\log u - \log(1 - u) + x}{T} \right),
        \quad u \sim U(0, 1)

    At every temperature :math:`P(m > 1/2) = \sigma(x)` and :math:`P(m \le y) =
    \sigma(T \log\frac{y}{1 - y} - x)`; as it goes to 0, draws become coin flips with
    the probability :math:`\sigma(x)`. The mean of :math:`m` is :math:`\sigma(x)` only
    at :math:`x = 0` or in this limit. Gradients pass: :math:`\partial m / \partial x =
    m (1 - m) / T`.

    Args:
      logits: :math:`x`, log-odds of being open.
      temperature: :math:`T > 0`; may be an array, to be lowered during training.
      hard: 1 where :math:`m > 1/2`, else 0, without a gradient: for evaluation.
      key: of the draws, one per logit.

    Returns:
      :math:`m`, in the dtype of the logits; computed in float32 at least.

    Raises:
      ValueError: if the temperature is a number that is not positive.

    Example:
      >>> closed, open_ = jnp.array([-40.0]), jnp.array([40.0])
      >>> gates = binary_concrete(jnp.stack([closed, open_]), key=jax.random.key(0))
      >>> print(gates.round(3).ravel())
      [0. 1.]

    References:
      The Concrete Distribution, ICLR 2017, appendix B (its :math:`\log\alpha` is
      :math:`x`); Categorical Reparameterization with Gumbel-Softmax, ICLR 2017.
    """
    if not isinstance(temperature, jax.Array) and temperature <= 0:
        raise ValueError(
            f"`temperature` must be positive, got {temperature!r}; small ones, such as "
            "0.1, make draws nearly binary."
        )
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    # The logistic noise log u - log(1 - u); `jax.random` keeps u off 0 and 1.
    noise = jax.random.logistic(key, logits.shape, wide)
    shifted = logits.astype(wide) + noise
    drawn = shifted > 0 if hard else jax.nn.sigmoid(shifted / temperature)
    return drawn.astype(logits.dtype)
