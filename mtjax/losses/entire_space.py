"""Losses of conversions that are seen only after a click, on all impressions.

Everything is computed from logits, in logarithms: no probability is clipped, and the
chance of a rare conversion keeps its gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

Logits = Float[Array, " batch"]
Labels = Num[Array | np.ndarray, " batch"]


class LogProbabilities(NamedTuple):
    """Logarithms of a probability and of its complement.

    Attributes:
      yes: log p.
      no: log (1 - p).
    """

    yes: Float[Array, " batch"]
    no: Float[Array, " batch"]


class EntireSpaceLosses(NamedTuple):
    """The two losses of ESMM.

    Attributes:
      click: mean cross-entropy of the click.
      both: mean cross-entropy of click and conversion.
    """

    click: Float[Array, ""]
    both: Float[Array, ""]


def product_of_chances(
    click_logits: Logits, conversion_logits: Logits
) -> LogProbabilities:
    r"""The chance of click and conversion, in logarithms.

    .. math:: \log p = \log\sigma(a) + \log\sigma(b), \quad
        \log(1 - p) = \log\left(\sigma(-a) + \sigma(a) \sigma(-b)\right)

    Args:
      click_logits: a, of the click.
      conversion_logits: b, of the conversion of what is clicked.

    Returns:
      `LogProbabilities`; exact also where p is near 0 or 1.

    Example:
      >>> log_p = product_of_chances(jnp.array([0.0]), jnp.array([0.0]))
      >>> print(jnp.exp(log_p.yes), jnp.exp(log_p.no))
      [0.25] [0.75]
    """
    log_click = jax.nn.log_sigmoid(click_logits)
    yes = log_click + jax.nn.log_sigmoid(conversion_logits)
    likely = jnp.logaddexp(
        jax.nn.log_sigmoid(-click_logits),
        log_click + jax.nn.log_sigmoid(-conversion_logits),
    )
    # Near p = 0 the sum above rounds to 1, near p = 1 the difference below to 0.
    is_rare = yes < -1.0
    rare = jnp.log1p(-jnp.exp(jnp.where(is_rare, yes, -1.0)))
    return LogProbabilities(yes, jnp.where(is_rare, rare, likely))


def entire_space_losses(
    click_logits: Logits,
    conversion_logits: Logits,
    clicks: Labels,
    conversions: Labels,
) -> EntireSpaceLosses:
    r"""The losses of ESMM: the conversion is learned by its product with the click.

    Args:
      click_logits: of the click.
      conversion_logits: of the conversion of what is clicked; they get no loss of
        their own.
      clicks: 0 or 1.
      conversions: 0 or 1; counts only where there was a click.

    Returns:
      Both losses, means over all impressions.

    Example:
      >>> zero, one = jnp.zeros(1), jnp.ones(1)
      >>> losses = entire_space_losses(zero, zero, one, zero)
      >>> print(losses.click.round(4), losses.both.round(4))  # log 2, log 4/3
      0.6931 0.2877

    References:
      Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click
      Conversion Rate, SIGIR 2018, equation 3.
    """
    click = LogProbabilities(
        jax.nn.log_sigmoid(click_logits), jax.nn.log_sigmoid(-click_logits)
    )
    both = product_of_chances(click_logits, conversion_logits)
    return EntireSpaceLosses(
        _cross_entropy(click, clicks), _cross_entropy(both, clicks * conversions)
    )


def inverse_propensity_loss(
    errors: Float[Array, " batch"],
    clicks: Labels,
    click_logits: Logits,
    *,
    clip: float = 0.01,
    normalise: bool = False,
) -> Float[Array, ""]:
    r"""The mean loss over all impressions, estimated from those that were clicked.

    .. math:: \frac1n \sum_i \frac{o_i e_i}{\max(\hat p_i, c)}

    It is unbiased if :math:`\hat p` is the true chance of a click and never below c.

    Args:
      errors: e, losses of the conversion; where there was no click any finite number.
      clicks: o, 0 or 1.
      click_logits: of :math:`\hat p`; they get no gradient.
      clip: c in [0, 1], the smallest propensity.
      normalise: divide by the sum of the weights in place of n: less variance, a small
        bias, and 0 without a click.

    Returns:
      The estimate.

    Raises:
      ValueError: if `clip` is out of range.

    Example:
      >>> errors, clicks = jnp.array([3.0, 0.0]), jnp.array([1, 0])
      >>> print(inverse_propensity_loss(errors, clicks, jnp.zeros(2)))
      3.0

    References:
      ESCM2: Entire Space Counterfactual Multi-Task Model for Post-Click Conversion Rate
      Estimation, SIGIR 2022.
    """
    weights = _inverse_propensities(clicks, click_logits, clip)
    total = jnp.sum(weights * errors)
    if not normalise:
        return total / len(errors)
    mass = jnp.sum(weights)
    return total / jnp.where(mass > 0, mass, 1.0)


def doubly_robust_loss(
    errors: Float[Array, " batch"],
    imputed: Float[Array, " batch"],
    clicks: Labels,
    click_logits: Logits,
    *,
    clip: float = 0.01,
) -> Float[Array, ""]:
    r"""As `inverse_propensity_loss`, of what an imputation leaves over.

    .. math:: \frac1n \sum_i \hat e_i + \frac{o_i (e_i - \hat e_i)}{\max(\hat p_i, c)}

    It is unbiased if either the imputation or the propensity is right. Train the
    imputation with `imputation_loss`.

    Args:
      errors: e, losses of the conversion; where there was no click any finite number.
      imputed: :math:`\hat e`, what a model expects them to be.
      clicks: o, 0 or 1.
      click_logits: of :math:`\hat p`; they get no gradient.
      clip: c in [0, 1], the smallest propensity.

    Returns:
      The estimate.

    Raises:
      ValueError: if `clip` is out of range.

    Example:
      >>> errors, imputed = jnp.array([3.0, 0.0]), jnp.array([2.0, 5.0])
      >>> clicks = jnp.array([1, 0])
      >>> print(doubly_robust_loss(errors, imputed, clicks, jnp.zeros(2)))
      4.5

    References:
      See `inverse_propensity_loss`.
    """
    weights = _inverse_propensities(clicks, click_logits, clip)
    return jnp.mean(imputed + weights * (errors - imputed))


def imputation_loss(
    errors: Float[Array, " batch"],
    imputed: Float[Array, " batch"],
    clicks: Labels,
    click_logits: Logits,
    *,
    clip: float = 0.01,
) -> Float[Array, ""]:
    r"""What the imputation of `doubly_robust_loss` is trained with.

    .. math:: \frac1n \sum_i \frac{o_i (e_i - \hat e_i)^2}{\max(\hat p_i, c)}

    Args:
      errors: as there.
      imputed: as there.
      clicks: as there.
      click_logits: as there.
      clip: as there.

    Returns:
      The loss.

    Raises:
      ValueError: if `clip` is out of range.

    Example:
      >>> errors, imputed = jnp.array([3.0, 0.0]), jnp.array([2.0, 5.0])
      >>> print(imputation_loss(errors, imputed, jnp.array([1, 0]), jnp.zeros(2)))
      1.0
    """
    weights = _inverse_propensities(clicks, click_logits, clip)
    return jnp.mean(weights * (errors - imputed) ** 2)


def _inverse_propensities(clicks: Labels, click_logits: Logits, clip: float):
    """`clicks / max(p, clip)`."""
    if not 0 <= clip <= 1:
        raise ValueError(
            f"`clip` must be a probability in [0, 1], got {clip!r}; 0.01 to 0.1 is "
            "usual."
        )
    propensity = jax.nn.sigmoid(jax.lax.stop_gradient(click_logits))
    # A click that was given no chance at all: a large weight, not an infinite one.
    smallest = max(clip, float(jnp.finfo(click_logits.dtype).tiny))
    return jnp.where(clicks > 0, clicks / jnp.maximum(propensity, smallest), 0.0)


def _cross_entropy(log_p: LogProbabilities, labels: Labels) -> Float[Array, ""]:
    return -jnp.mean(labels * log_p.yes + (1 - labels) * log_p.no)
