"""The entropy of predictions."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def entropy_loss(
    logits: Float[Array, "*examples classes"], *, normalise: bool = False
) -> Float[Array, ""]:
    r"""Mean entropy of predictions, in nats.

    .. math:: \frac1n \sum_i -\sum_c p_{ic} \log p_{ic}, \quad p_i = softmax(z_i)

    Args:
      logits: :math:`z`; minus infinity masks a class.
      normalise: divide by the logarithm of the number of classes (at least two), so
        that tasks with many classes weigh no more than others.

    Returns:
      Between 0 and :math:`\log C`, or 1 if normalised.

    Example:
      >>> print(f"{entropy_loss(jnp.array([[0.0, 0.0], [1e4, -1e4]])):.4f}")
      0.3466
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    p = jnp.exp(log_p)
    # A masked class has p = 0, and 0 times infinity is NaN.
    entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)
    return jnp.mean(entropy) / (np.log(logits.shape[-1]) if normalise else 1.0)


def summed_entropies(
    logits: Mapping[str, Float[Array, "..."]], *, normalise: bool = False
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum over tasks of the entropies of their predictions, and each of them.

    Args:
      logits: by task, at least one.
      normalise: see `entropy_loss`.

    Returns:
      The sum, and the entropy by task, as `jax.value_and_grad(..., has_aux=True)` of a
      loss wants them.
    """
    entropies = {t: entropy_loss(z, normalise=normalise) for t, z in logits.items()}
    return jnp.sum(jnp.stack([*entropies.values()])), entropies
