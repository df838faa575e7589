"""Hard parameter sharing: one encoder, one head per task."""

from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Array, Float


class SharedBottom(nn.Module):
    """An encoder that all tasks share, and a small head for each of them.

    Attributes:
      encoder: any module from inputs to a representation of shape `(batch, features)`.
      outputs: number of outputs of each task.
      hidden: width of the heads' one hidden layer; 0 makes them linear.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtjax.nn import MLP
      >>> model = SharedBottom(MLP((8,)), {"digit": 10, "parity": 1})
      >>> params = model.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> sorted(params["params"])
      ['digit_hidden', 'digit_output', 'encoder', 'parity_hidden', 'parity_output']
      >>> {t: y.shape for t, y in model.apply(params, jnp.ones((4, 3))).items()}
      {'digit': (4, 10), 'parity': (4, 1)}

    References:
      Multitask Learning, 1997.
    """

    encoder: nn.Module
    outputs: Mapping[str, int]
    hidden: int = 32

    @nn.compact
    def __call__(self, inputs: Array) -> dict[str, Float[Array, "batch _"]]:
        """Computes the outputs of every task."""
        z = self.encoder(inputs)
        outputs = {}
        for task, size in self.outputs.items():
            h = z
            if self.hidden:
                h = nn.relu(nn.Dense(self.hidden, name=f"{task}_hidden")(z))
            outputs[task] = nn.Dense(size, name=f"{task}_output")(h)
        return outputs
