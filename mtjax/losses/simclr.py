"""Two views of an input resemble each other more than anything else in the batch."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.losses.contrastive import contrastive_loss


def simclr_loss(
    first: Float[Array, "examples features"],
    second: Float[Array, "examples features"],
    *,
    temperature: float = 0.5,
    eps: float = 1e-12,
) -> Float[Array, ""]:
    r"""Contrastive loss of two views, each an anchor once (NT-Xent).

    `contrastive_loss` of cosines: the other view of the same input is the positive, all
    views of the other inputs are negatives.

    Args:
      first: features of one view of every input, at least two inputs.
      second: features of the other view.
      temperature: > 0, by which cosines are divided.
      eps: smallest squared norm; features of zero have no direction.

    Returns:
      The mean over all views, in nats.

    Raises:
      ValueError: if there is one input only, or the temperature is not positive.

    Example:
      >>> z = jnp.eye(2)
      >>> print(f"{simclr_loss(z, z, temperature=1.0):.4f}")  # log(1 + 2 / e)
      0.5514

    References:
      A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020,
      equation 1.
    """
    number = len(first)
    if number < 2:
        raise ValueError(
            f"`first` must hold at least two inputs, got {number}: the others are the "
            "negatives."
        )
    z = jnp.concatenate([first, second]).astype(jnp.float32)
    # Not a maximum of the norm: its slope at zero would be NaN.
    z = z / jnp.sqrt(jnp.sum(z**2, axis=1, keepdims=True) + eps)
    cosines = z @ z.T
    place = jnp.arange(2 * number) % number
    others = place[:, None] != place[None]
    positives = jnp.sum(z * jnp.roll(z, number, axis=0), axis=1, keepdims=True)
    return contrastive_loss(positives, cosines, mask=others, temperature=temperature)
