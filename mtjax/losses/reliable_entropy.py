"""The entropy of those predictions that are certain enough to learn from."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtjax.losses.entropy import entropy_loss


def reliable_entropy_loss(
    logits: Float[Array, "examples classes"], *, margin: float = 0.4
) -> Float[Array, ""]:
    r"""Mean entropy of the predictions whose entropy is below a margin.

    .. math:: \mathrm{mean}_{i: H_i < m \log C} \; H_i

    Very uncertain inputs have large and harmful gradients; here they have none.

    Args:
      logits: :math:`C` classes, at least two.
      margin: :math:`m` in (0, 1], of the largest entropy that there is.

    Returns:
      In nats; 0, without a gradient, if no prediction is reliable.

    Raises:
      ValueError: if the margin is out of range.

    Example:
      >>> logits = jnp.array([[0.0, 0.0], [3.0, 0.0]])
      >>> print(f"{reliable_entropy_loss(logits):.4f}")
      0.1909

    References:
      Towards Stable Test-Time Adaptation in Dynamic Wild World, ICLR 2023 (SAR),
      equation 2 without the flatness, which `sharpness_aware` adds. There an input must
      be reliable before the perturbation too; the reset of the model is left out.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"`margin` must be in (0, 1], got {margin!r}.")
    entropies = jax.vmap(entropy_loss)(logits)
    reliable = entropies < margin * np.log(logits.shape[-1])
    total = jnp.sum(jnp.where(reliable, entropies, 0.0))
    return total / jnp.maximum(jnp.sum(reliable), 1)
