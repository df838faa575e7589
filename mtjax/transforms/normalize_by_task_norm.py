"""The gradient of the one task of a step, brought to a length that the task has."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax.balancing.balancer import check_choice
from mtjax.transforms.perturbation import scaled_norm

NormScope = Literal["global", "per_tensor"]


def normalize_by_task_norm(
    task_scales: Mapping[str, float | int] | Sequence[float | int],
    *,
    norm_scope: NormScope = "global",
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the gradient of the task that was drawn a length of the task's own.

    :math:`g \leftarrow \omega_k \, g / \|g\|` for task :math:`k`. A gradient of zero
    stays zero.

    Args:
      task_scales: :math:`\omega_k \ge 0`, by task name or in the order of the sorted
        names.
      norm_scope: "global": the norm over all parameters; "per_tensor": each leaf has
        its own.

    Returns:
      A transform of the plain gradient of one task's loss, without state, whose update
      takes `task_id`, an integer from 0 to K - 1, traced or not. Inside `shard_map` or
      `pmap` average the gradient over the devices first. A gradient that is not finite
      stays not finite.

    Raises:
      ValueError: if a scale is negative or not finite, or `norm_scope` unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = normalize_by_task_norm([1.0, 2.0])
      >>> print(tx.update(jnp.array([3.0, 4.0]), tx.init(None), task_id=1)[0])
      [1.2 1.6]

    References:
      Uni-Perceiver v2: A Generalist Model for Large-Scale Vision and Vision-Language
      Tasks, 2022, section on task-balanced gradient normalization.
    """
    scales = per_task("task_scales", task_scales)
    if min(scales) < 0:
        raise ValueError(f"`task_scales` must not be negative, got {task_scales}.")
    check_choice("norm_scope", norm_scope, ("global", "per_tensor"))

    def update(updates, state, params=None, *, task_id=None, **extra_args):
        del params, extra_args
        check_task_id("normalize_by_task_norm", task_id)
        scale = jnp.asarray(scales, jnp.float32)[task_id]
        leaves, structure = jax.tree.flatten(updates)
        wide = [g.astype(jnp.float32) for g in leaves]
        if norm_scope == "global":
            norms = [scaled_norm(wide)] * len(wide)
        else:
            norms = [scaled_norm([g]) for g in wide]
        scaled = [
            (scale * (g / unit / length)).astype(old.dtype)
            for g, (unit, length), old in zip(wide, norms, leaves)
        ]
        return structure.unflatten(scaled), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def check_task_id(name: str, task_id: Any) -> None:
    """Raises ValueError if a transform was not told which task the gradient is of."""
    if task_id is None:
        raise ValueError(
            f"`{name}` needs the extra argument `task_id`; call "
            "`tx.update(grads, state, params, task_id=task_id)`."
        )


def per_task(argument: str, values: Any) -> tuple[float, ...]:
    """One number per task in the order of the sorted names.

    Args:
      argument: name, for the error.
      values: by task name, or a sequence in that order.

    Returns:
      The numbers.

    Raises:
      ValueError: if there is none, or one is not finite.
    """
    if isinstance(values, Mapping):
        values = [values[task] for task in sorted(values)]
    found = tuple(float(x) for x in values)
    if not found or not np.all(np.isfinite(found)):
        raise ValueError(
            f"`{argument}` must hold one finite number per task, got {list(found)}."
        )
    return found
