"""Means over the entries of a batch that have a label."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num


def masked_mean(
    values: Float[Array, "..."],
    mask: Bool[Array, "..."] | Num[Array, "..."],
    axis: int | Sequence[int] | None = None,
) -> Float[Array, "..."]:
    """Mean over the entries whose mask is set; zero where there is none.

    ``sum(where(mask, values, 0)) / max(1, sum(mask))``

    Guaranteed, whatever `values` holds at masked-out places (NaN and infinities too):
    the result does not depend on them, and the gradient that flows back into `values`
    is exactly 0 there. With an empty mask the result and every such gradient are 0, so
    that a task without labels in a batch contributes nothing to an update.

    Not guaranteed: that 0 stays 0 further back. Where the derivative of `values` itself
    is NaN or infinite (the square of a NaN label, `log` or `sqrt` at 0, a division by
    0), the chain rule makes 0 * NaN = NaN. Put harmless inputs in before such a
    function: `(prediction - jnp.where(mask, label, 0.0)) ** 2`.

    Args:
      values: per-entry losses, of any shape.
      mask: set (True or non-zero) where an entry counts; of the rank of `values`, with
        its sizes or 1.
      axis: axis or axes to average over; None means all.

    Returns:
      The mean, in the type of `values`; the entries are counted in float32.

    Raises:
      ValueError: if the shape of `mask` does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtjax.losses import masked_mean
      >>> values = jnp.array([[1.0, jnp.nan], [3.0, 5.0]])
      >>> labelled = jnp.array([[True, False], [True, True]])
      >>> print(masked_mean(values, labelled))
      3.0
      >>> print(masked_mean(values, labelled, axis=1))
      [1. 4.]
    """
    fits = mask.ndim == values.ndim and all(
        m in (1, v) for m, v in zip(mask.shape, values.shape)
    )
    if not fits:
        raise ValueError(
            f"`mask` must have the shape of `values`, {values.shape}, or 1 in places, "
            f"got {mask.shape}; add axes of size 1 with `mask[:, None]`."
        )
    is_set = jnp.broadcast_to(mask.astype(bool), values.shape)
    count = jnp.sum(is_set, axis=axis, dtype=jnp.float32)
    total = jnp.sum(jnp.where(is_set, values, 0), axis=axis, dtype=jnp.float32)
    return (total / jnp.maximum(count, 1.0)).astype(values.dtype)
