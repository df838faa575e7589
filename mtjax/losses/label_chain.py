"""A penalty on predictions that rise along a chain of labels, each needing the last."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from mtjax.losses.masked import masked_mean


def label_chain_penalty(
    logits: Mapping[str, Float[Array, " batch"]],
    chain: Sequence[str],
    *,
    mask: Bool[Array, " batch"] | Num[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    r"""How much a step is predicted to be more probable than the step before.

    .. math:: \sum_{t \ge 2} \frac1n \sum_i \max(\hat y_{it} - \hat y_{i,t-1}, 0),
        \quad \hat y = \sigma(z)

    Args:
      logits: :math:`z` by task.
      chain: names of the tasks from the first step to the last, all different.
      mask: set where an example counts; all if None.

    Returns:
      The penalty, 0 where predictions never rise along the chain. AITM adds it to the
      losses times 0.6.

    Raises:
      ValueError: if `chain` names an unknown task, or one twice.

    Example:
      >>> logits = {"click": jnp.array([0.0, 2.0]), "buy": jnp.array([9.0, 1.0])}
      >>> print(label_chain_penalty(logits, ("click", "buy")).round(4))
      0.2499

    References:
      Modeling the Sequential Dependence among Audience Multi-step Conversions with
      Multi-task Learning in Targeted Display Advertising, KDD 2021, equation 9.
    """
    unknown = sorted(set(chain) - set(logits))
    if unknown or len(set(chain)) != len(chain):
        raise ValueError(
            f"`chain` must name tasks of `logits`, {sorted(logits)}, once each, got "
            f"{tuple(chain)!r}."
        )
    if len(chain) < 2:
        return jnp.zeros(())
    p = jax.nn.sigmoid(jnp.stack([logits[task] for task in chain]))
    rises = jnp.sum(jnp.maximum(p[1:] - p[:-1], 0.0), axis=0)
    return masked_mean(rises, jnp.ones(rises.shape) if mask is None else mask)
