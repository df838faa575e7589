"""Inner products of the inputs of dense layers."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def dense_grams(
    run: Callable[[], Any],
    mask: Bool[Array | np.ndarray, "*positions"] | None = None,
) -> dict[str, Float[Array, "inputs inputs"]]:
    r"""What the dense layers of a Linen model see: $X^\top X$ for every kernel.

    Args:
      run: applies the model, such as `lambda: model.apply({"params": params}, images)`.
        May be traced: wrap `dense_grams` itself in `jax.jit`.
      mask: which positions count, of the shape that inputs have before their last axis:
        not the padding of texts. All by default.

    Returns:
      By the path of the kernel in `params` ("block_0/query/kernel") the sum over all
      examples and positions, in float32. A layer that is used several times adds up.
      Sums of several batches may be added.

    Example:
      >>> import jax
      >>> model = nn.Dense(3)
      >>> params = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> grams = dense_grams(lambda: model.apply(params, jnp.ones((2, 4))))
      >>> grams["kernel"].shape, float(grams["kernel"][0, 0])
      ((4, 4), 2.0)
    """
    grams: dict[str, Array] = {}

    def note(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            inputs = args[0].reshape(-1, args[0].shape[-1]).astype(jnp.float32)
            path = "/".join((*context.module.path, "kernel"))
            counted = inputs if mask is None else inputs * jnp.reshape(mask, (-1, 1))
            gram = jnp.matmul(inputs.T, counted, precision="highest")
            grams[path] = grams[path] + gram if path in grams else gram
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        run()
    return grams
