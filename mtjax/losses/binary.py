"""Cross-entropies of several binary tasks, each over the examples with its label."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.losses.masked import masked_mean


def binary_losses(
    logits: Mapping[str, Float[Array, " batch"]],
    labels: Mapping[str, Float[Array, " batch"]],
) -> dict[str, Float[Array, ""]]:
    r"""The mean binary cross-entropy of every task in its own sample space.

    .. math::
      L_t = \frac{1}{\sum_i \delta_t^i} \sum_i \delta_t^i \,
      \big(\log(1 + e^{z_t^i}) - y_t^i z_t^i\big)

    with :math:`\delta_t^i = 0` where example :math:`i` has no label of task :math:`t`.

    Args:
      logits: :math:`z_t`, by task.
      labels: :math:`y_t` in [0, 1], by task; NaN where there is none.

    Returns:
      The losses by task of `logits`, 0 for a task without any label.

    Raises:
      ValueError: if a task of `logits` has no entry in `labels`.

    Example:
      >>> logits = {"click": jnp.array([0.0, 3.0]), "buy": jnp.array([0.0, 9.0])}
      >>> labels = {"click": jnp.array([1.0, 1.0]), "buy": jnp.array([0.0, jnp.nan])}
      >>> losses = binary_losses(logits, labels)
      >>> print({task: f"{loss:.3f}" for task, loss in losses.items()})
      {'click': '0.371', 'buy': '0.693'}

    References:
      Progressive Layered Extraction (PLE), RecSys 2020, equation of the joint loss for
      different sample spaces.
    """
    missing = sorted(set(logits) - set(labels))
    if missing:
        raise ValueError(
            f"`labels` must hold every task of `logits`, {missing} are missing from "
            f"{sorted(labels)}. A task without labels in this batch has NaN everywhere."
        )
    losses = {}
    for task, z in logits.items():
        known = ~jnp.isnan(labels[task])
        # A NaN label would reach the gradient through its product with the logit.
        y = jnp.where(known, labels[task], 0)
        losses[task] = masked_mean(optax.sigmoid_binary_cross_entropy(z, y), known)
    return losses
