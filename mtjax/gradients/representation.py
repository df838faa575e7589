"""The `representation` engine: gradients at the shared representation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtjax.gradients.split import path_name

PyTree = Any


def compose(
    encode: Callable[..., Any], losses_from_representation: Callable[..., Any]
) -> Callable[..., Any]:
    """The plain `losses_fn` of a pair `(encode, losses_from_representation)`."""

    def losses_fn(params, *args, **kwargs):
        z = encode(params, *args, **kwargs)
        return losses_from_representation(params, z, *args, **kwargs)

    return losses_fn


def with_probes(
    pair: tuple[Callable[..., Any], Callable[..., Any]],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    has_aux: bool,
) -> tuple[Callable[..., tuple[list[jax.Array], Any]], list[jax.Array]]:
    """Adds zeros to the shared representation, whose gradients are the probes.

    One pullback then serves both: on the parameters it is the usual one, on the probes
    it stops at the representation, and the encoder's backward pass is not computed.

    Args:
      pair: `(encode, losses_from_representation)`.
      params: the parameters.
      args: arguments of both functions.
      kwargs: keyword arguments of both functions.
      has_aux: whether the second function returns `(losses, aux)`.

    Returns:
      The program on parameter leaves followed by probe leaves, and the probes.

    Raises:
      TypeError: if the representation has leaves that are not floating-point.
    """
    encode, losses_from_representation = pair
    shapes = jax.eval_shape(lambda p: encode(p, *args, **kwargs), params)
    for path, z in jax.tree_util.tree_leaves_with_path(shapes):
        if not jnp.issubdtype(z.dtype, jnp.inexact):
            raise TypeError(
                "`encode` must return floating-point arrays, got "
                f"{z.dtype} at '{path_name(path) or 'z'}'; return masks and labels "
                "from the batch instead."
            )
    probes = [jnp.zeros(z.shape, z.dtype) for z in jax.tree.leaves(shapes)]
    structure, num_params = jax.tree.structure(params), len(jax.tree.leaves(params))

    def program(*leaves):
        params = structure.unflatten(leaves[:num_params])
        z, z_structure = jax.tree.flatten(encode(params, *args, **kwargs))
        z = [a + probe for a, probe in zip(z, leaves[num_params:])]
        result = losses_from_representation(
            params, z_structure.unflatten(z), *args, **kwargs
        )
        losses, aux = result if has_aux else (result, None)
        return [losses[task] for task in sorted(losses)], aux

    return program, probes
