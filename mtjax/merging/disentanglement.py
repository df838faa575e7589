"""Do task vectors leave each other's tasks alone?"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def disentanglement_error(
    logits_fn: Callable[[PyTree, str, Any], Array],
    alone: Mapping[str, PyTree],
    together: PyTree,
    inputs: Mapping[str, Any],
) -> float:
    r"""How often the other task vectors change what the model says about a task.

    .. math:: \mathrm{mean}_t \; \mathrm{mean}_{x \in D_t} \,
              1[f_t(x; \theta_0 + \tau_t) \ne f_t(x; \theta_0 + \sum_s \tau_s)]

    Args:
      logits_fn: `logits_fn(params, task, inputs)`, with the head of the task.
      alone: by task the base plus its own scaled vector.
      together: the base plus the scaled vectors of all these tasks, two in the paper.
      inputs: of every task.

    Returns:
      A fraction, 0 if vectors are disentangled.

    Raises:
      ValueError: if models and inputs are not of the same tasks.

    Example:
      >>> logits_fn = lambda params, task, x: x * params
      >>> x = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[1.0, 2.0]])}
      >>> disentanglement_error(logits_fn, {"a": 1.0, "b": -1.0}, 1.0, x)
      0.5

    References:
      Task Arithmetic in the Tangent Space, NeurIPS 2023, equation 5.
    """
    if alone.keys() != inputs.keys():
        raise ValueError(
            "`inputs` must be of the tasks of `alone`, got "
            f"{sorted(inputs)} and {sorted(alone)}."
        )

    def differ(task):
        guess = lambda params: logits_fn(params, task, inputs[task]).argmax(-1)
        return jnp.mean(guess(alone[task]) != guess(together))

    return float(np.mean([differ(task) for task in alone]))
