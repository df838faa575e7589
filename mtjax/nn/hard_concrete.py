"""Hard concrete variables: random gates that are exactly 0 or 1 with some chance."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mtjax.nn.concrete import binary_concrete


def hard_concrete(
    log_alpha: Float[Array, "*shape"],
    *,
    temperature: float = 2 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*shape"]:
    r"""A binary concrete variable, stretched and clipped to [0, 1].

    .. math:: z = clip(s (\zeta - \gamma) + \gamma, 0, 1), \quad
        s = \sigma\left(\frac{\log u - \log(1 - u) + \log\alpha}{\beta}\right)

    Args:
      log_alpha: :math:`\log\alpha`, the log-odds of s > 1/2.
      temperature: :math:`\beta > 0`.
      stretch: :math:`\gamma < 0` and :math:`\zeta > 1`.
      key: of the draws. Without it the value for inference, where
        :math:`s = \sigma(\log\alpha)`.

    Returns:
      z.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> print(hard_concrete(jnp.array([-5.0, 0.0, 5.0])))
      [0.  0.5 1. ]

    References:
      Learning Sparse Neural Networks through L0 Regularization, ICLR 2018, equations
      10, 11 and 13.
    """
    gamma, zeta = _checked(temperature, stretch)
    if key is None:
        s = jax.nn.sigmoid(log_alpha)
    else:
        s = binary_concrete(log_alpha, temperature, key=key)
    return jnp.clip(s * (zeta - gamma) + gamma, 0.0, 1.0)


def open_probability(
    log_alpha: Float[Array, "*shape"],
    *,
    temperature: float = 2 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
) -> Float[Array, "*shape"]:
    r"""The probability that a hard concrete variable is not 0.

    .. math:: P(z \ne 0) = \sigma\left(\log\alpha - \beta \log\frac{-\gamma}{\zeta}
        \right)

    Their sum is the expected number of open gates, the L0 penalty.

    Args:
      log_alpha: see `hard_concrete`.
      temperature: :math:`\beta`.
      stretch: :math:`\gamma` and :math:`\zeta`.

    Returns:
      Probabilities.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> print(open_probability(jnp.array([0.0])).round(3))
      [0.832]
    """
    gamma, zeta = _checked(temperature, stretch)
    shift = temperature * float(np.log(-gamma / zeta))
    return jax.nn.sigmoid(log_alpha - shift)


def _checked(temperature: float, stretch: tuple[float, float]) -> tuple[float, float]:
    gamma, zeta = stretch
    if temperature <= 0 or gamma >= 0 or zeta <= 1:
        raise ValueError(
            "`temperature` must be positive and `stretch` must reach below 0 and above "
            f"1, got {temperature!r} and {stretch!r}."
        )
    return gamma, zeta
