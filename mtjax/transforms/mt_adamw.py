"""AdamW for one task at a time."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from mtjax.gradients import ParameterSplit
from mtjax.transforms.normalize_by_task_norm import (
    NormScope,
    check_task_id,
    normalize_by_task_norm,
    per_task,
)
from mtjax.transforms.scale_by_mt_adam import Inactive, scale_by_mt_adam, uses_of


def mt_adamw(
    learning_rate: optax.ScalarOrSchedule,
    sampling_ratios: Mapping[str, float | int] | Sequence[float | int],
    task_scales: Mapping[str, float | int] | Sequence[float | int] | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    norm_scope: NormScope = "global",
    inactive: Inactive = "freeze",
    split: ParameterSplit | None = None,
    max_compensation: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW in which each step has one task, however long its gradient and rare it is.

    `normalize_by_task_norm`, `scale_by_mt_adam`, decoupled weight decay and the
    learning rate in a chain: what a task contributes is its scale :math:`\omega_k`, not
    the size of its loss, nor how often it is drawn.

    Args:
      learning_rate: :math:`\alpha`, or a schedule over all steps. A task with a small
        ratio :math:`s_k` moves parameters by up to about
        :math:`\alpha (1 - b_1) / \sqrt{(1 - b_2) s_k}` when it first comes after many
        steps of others; warm up, or bound the compensation.
      sampling_ratios: how often each task is drawn, see `scale_by_mt_adam`.
      task_scales: :math:`\omega_k`, see `normalize_by_task_norm`; ones if not given.
      b1: see `scale_by_mt_adam`.
      b2: see `scale_by_mt_adam`.
      eps: see `scale_by_mt_adam`. Normalised gradients of P parameters have entries of
        about :math:`P^{-1/2}`.
      weight_decay: of all parameters that the task of the step uses, at least 0.
      norm_scope: see `normalize_by_task_norm`.
      inactive: see `scale_by_mt_adam`. With "freeze" parameters that the task does not
        use do not decay either.
      split: see `scale_by_mt_adam`.
      max_compensation: see `scale_by_mt_adam`.

    Returns:
      A transform of the plain gradient of one task's loss, whose update takes
      `task_id` and needs `params`. `mtjax.training.make_unmixed_step` passes them.
      Clipping behind the normalisation does nothing at a norm of 1 and above;
      accumulated gradients must be of one task and averaged before.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = mt_adamw(0.1, [0.5, 0.5], eps=0.0, weight_decay=0.0)
      >>> params = jnp.array([1.0, 1.0])
      >>> grads = jnp.array([300.0, -0.4])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(params), params, task_id=0)[0])
      [-0.141  0.141]

    References:
      Uni-Perceiver v2: A Generalist Model for Large-Scale Vision and Vision-Language
      Tasks, 2022: MT-AdamW in its first version, task-balanced gradient normalization
      in that of CVPR 2023. Its text does not settle whether norms are global, as they
      are here by default; deviations: see `scale_by_mt_adam`.
    """
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay` must not be negative, got {weight_decay}.")
    num_tasks = len(sampling_ratios)
    if task_scales is None:
        task_scales = [1.0] * num_tasks
    scales = per_task("task_scales", task_scales)
    if isinstance(task_scales, Mapping) and isinstance(sampling_ratios, Mapping):
        fits = set(task_scales) == set(sampling_ratios)
    else:
        fits = len(scales) == num_tasks
    if not fits:
        raise ValueError(
            "`task_scales` must be of the tasks of `sampling_ratios`, got "
            f"{task_scales} and {sampling_ratios}."
        )
    chain = optax.chain(
        normalize_by_task_norm(scales, norm_scope=norm_scope),
        scale_by_mt_adam(
            sampling_ratios,
            b1=b1,
            b2=b2,
            eps=eps,
            inactive=inactive,
            split=split,
            max_compensation=max_compensation,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )

    def update(updates, state, params=None, *, task_id=None, **extra_args):
        check_task_id("mt_adamw", task_id)
        leaves, structure = jax.tree.flatten(updates)
        uses = structure.unflatten(uses_of(leaves, task_id, inactive, split))
        updates, state = chain.update(
            updates, state, params, task_id=task_id, **extra_args
        )
        updates = jax.tree.map(lambda u, g: jnp.where(u, g, 0), uses, updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(chain.init, update)
