"""Task arithmetic: add, negate and combine task vectors."""

from collections.abc import Sequence

import jax.numpy as jnp

from mtjax.merging.merger import Leaf, Merger, add_up, combined, step


def task_arithmetic(scale: float | Sequence[float | int] = 0.3) -> Merger:
    r"""The base plus a multiple of the task vectors.

    $$\theta = \theta_0 + \sum_t \lambda_t \tau_t$$

    Args:
      scale: $\lambda$, one for all models or one each, in the order of the models
        (names sorted). Negative ones forget: `task_arithmetic(-0.5)` of one model makes
        the base worse at its task. `(1, 1, -1)` is the analogy "a and b without c".

    Returns:
      The method; also a step for `chain`, behind steps that change task vectors.

    Example:
      >>> base = {"w": jnp.zeros(2)}
      >>> models = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
      >>> task_arithmetic(0.5)(base, models)["w"]
      Array([0.5, 1. ], dtype=float32)

    References:
      Ilharco et al., "Editing Models with Task Arithmetic", ICLR, 2023.
    """
    weights = jnp.asarray(scale, jnp.float32)
    if weights.ndim > 1:
        raise ValueError(f"`scale` must be a number or one per model, got {scale!r}.")

    def apply(leaf: Leaf):
        if weights.ndim == 0:
            return weights * add_up(leaf.vectors)
        check_one_each("scale", weights, leaf)
        return combined(weights, leaf.vectors)

    return step(apply)


def scale(factor: float) -> Merger:
    """Multiplies task vectors, or their combination, by a number.

    Args:
      factor: any number.

    Returns:
      A step for `chain`.
    """
    return step(lambda leaf: factor * leaf.vectors, needs_base=False)


def check_one_each(name: str, values, leaf: Leaf) -> None:
    """Raises a `ValueError` unless there is one value per model."""
    models = len(leaf.vectors)
    if len(values) != models:
        raise ValueError(
            f"`{name}` must hold one value per model ({models}), got {len(values)}."
        )
