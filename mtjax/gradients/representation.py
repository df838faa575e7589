"""The `representation` engine: gradients at the shared representation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtjax.gradients.split import path_name
from mtjax.gradients.trace import Cotangents, LossesFn, TracedLosses, checked_losses

PyTree = Any


def compose(encode: Callable[..., Any], losses_from_representation: LossesFn):
    """The plain `losses_fn` of a pair `(encode, losses_from_representation)`."""

    def losses_fn(params, *args, **kwargs):
        z = encode(params, *args, **kwargs)
        return losses_from_representation(params, z, *args, **kwargs)

    return losses_fn


def trace_at_representation(
    pair: tuple[Callable[..., Any], LossesFn],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    has_aux: bool,
    axis_name: str | None,
) -> tuple[TracedLosses, Callable[[Cotangents], PyTree]]:
    """Evaluates encoder and heads, with a pullback through each.

    Args:
      pair: `(encode, losses_from_representation)`.
      params: the parameters.
      args: arguments of both functions.
      kwargs: keyword arguments of both functions.
      has_aux: whether the second function returns `(losses, aux)`.
      axis_name: mesh or `pmap` axis that the batch is split over, if any.

    Returns:
      Losses and pullback to the parameters, as for a single function, and the pullback
      that stops at the representation.

    Raises:
      TypeError: if the representation has leaves that are not floating-point.
    """
    encode, losses_from_representation = pair
    z, pull_encoder = jax.vjp(lambda p: encode(p, *args, **kwargs), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(z):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                "`encode` must return floating-point arrays, got "
                f"{leaf.dtype} at '{path_name(path) or 'z'}'; return masks and labels "
                "from the batch instead."
            )
    losses, pull_heads, aux = jax.vjp(
        lambda p, z: checked_losses(
            losses_from_representation(p, z, *args, **kwargs), has_aux, axis_name
        ),
        params,
        z,
        has_aux=True,
    )

    def pullback(cotangents: Cotangents) -> PyTree:
        own, at_z = pull_heads(cotangents)
        (through_z,) = pull_encoder(at_z)
        return jax.tree.map(jnp.add, own, through_z)

    return TracedLosses(losses, aux, pullback), lambda c: pull_heads(c)[1]
