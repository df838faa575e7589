"""Adam's moments for gradients of one task at a time."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import check_choice
from mtjax.gradients import ParameterSplit
from mtjax.transforms.normalize_by_task_norm import check_task_id, per_task

Inactive = Literal["freeze", "decay"]


class MTAdamWState(NamedTuple):
    """State of `scale_by_mt_adam`.

    Attributes:
      counts: params-shaped, `()` int32: steps that changed the leaf's moments.
      mu: params-shaped, float32: averaged gradients.
      nu: params-shaped, float32: averaged squares.
    """

    counts: Any
    mu: Any
    nu: Any


def scale_by_mt_adam(
    sampling_ratios: Mapping[str, float | int] | Sequence[float | int],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    inactive: Inactive = "freeze",
    split: ParameterSplit | None = None,
    max_compensation: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction, with tasks weighed by the inverse of how often they are drawn.

    With task :math:`k` drawn,
    :math:`m \leftarrow \beta_1 m + (1 - \beta_1) \frac{1}{s_k} g` and
    :math:`n \leftarrow \beta_2 n + (1 - \beta_2) \frac{1}{s_k} g \odot g`, and the
    update is :math:`\hat m / (\sqrt{\hat n} + \epsilon)` with Adam's bias corrections.
    In expectation the moments are those of the sum over tasks, whatever the ratios.

    Args:
      sampling_ratios: :math:`s_k > 0`, by task name or in the order of the sorted
        names, such as `mtjax.data.mixture(...).weights`; divided by their sum.
      b1: decay of the averaged gradients, in [0, 1). The paper writes :math:`1 - b_1`.
      b2: decay of the averaged squares, in [0, 1).
      eps: :math:`\epsilon`, not negative.
      inactive: what happens to leaves that the task does not use. "freeze": moments and
        count stay, and the update is zero; "decay": a gradient of zero as any other.
      split: which task uses which leaf, from `mtjax.parameter_split`. With "freeze",
        the ratio of a task is then that among the tasks that use the leaf, which makes
        this Adam itself on a leaf of one task. Without it a leaf counts as not used in
        steps in which its whole gradient is zero, and the ratios are as given.
      max_compensation: bound on :math:`1 / s_k`, at least 1. Rare tasks that reach it
        weigh less, and no longer move the parameters far when they come up.

    Returns:
      A transform of the plain gradient of one task's loss, whose update takes
      `task_id`, an integer from 0 to K - 1, traced or not. One that makes all tasks'
      gradients equally long should stand before it (`normalize_by_task_norm`).

    Raises:
      ValueError: if an argument is out of its range; at update time, if `split` is of
        other parameters or `task_id` is not passed.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_mt_adam({"often": 0.75, "rare": 0.25}, b1=0.5, b2=0.5)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), task_id=1)
      >>> print(state.mu, state.nu, updates)
      [2.] [2.] [2.]

    References:
      Uni-Perceiver v2: A Generalist Model for Large-Scale Vision and Vision-Language
      Tasks, 2022, the equations of MT-AdamW. Deviations: the bias corrections, which
      the paper leaves out for simplicity; "freeze" and `max_compensation` are ours.
    """
    ratios = per_task("sampling_ratios", sampling_ratios)
    if min(ratios) <= 0:
        raise ValueError(
            f"`sampling_ratios` must be positive, got {sampling_ratios}; leave out "
            "tasks that are never drawn."
        )
    for name, decay in (("b1", b1), ("b2", b2)):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`{name}` must be in [0, 1), got {decay}.")
    if not eps >= 0:
        raise ValueError(f"`eps` must not be negative, got {eps}.")
    check_choice("inactive", inactive, ("freeze", "decay"))
    if max_compensation is not None and not max_compensation >= 1:
        raise ValueError(
            f"`max_compensation` must be at least 1, got {max_compensation}."
        )
    if split is not None and len(split.tasks) != len(ratios):
        raise ValueError(
            f"`sampling_ratios` must be one for each of the tasks {split.tasks} of "
            f"`split`, got {len(ratios)}."
        )
    ratios = np.array(ratios) / np.sum(ratios)

    def init(params):
        zeros = lambda p: jnp.zeros(jnp.shape(p), jnp.float32)
        return MTAdamWState(
            jax.tree.map(lambda _: jnp.zeros((), jnp.int32), params),
            jax.tree.map(zeros, params),
            jax.tree.map(zeros, params),
        )

    def advance(grad, uses, factor, count, mu, nu):
        g = grad.astype(jnp.float32)
        count = count + uses.astype(jnp.int32)
        mu = jnp.where(uses, b1 * mu + (1.0 - b1) * factor * g, mu)
        nu = jnp.where(uses, b2 * nu + (1.0 - b2) * factor * g**2, nu)
        t = jnp.maximum(count, 1).astype(jnp.float32)
        mean, square = mu / (1.0 - b1**t), nu / (1.0 - b2**t)
        # With `eps=0` what never had a gradient would be 0 / 0.
        root = jnp.sqrt(square) + eps
        change = jnp.where(root > 0, mean / jnp.where(root > 0, root, 1.0), mean)
        return jnp.where(uses, change, 0.0).astype(grad.dtype), count, mu, nu

    def update(updates, state, params=None, *, task_id=None, **extra_args):
        del params, extra_args
        check_task_id("scale_by_mt_adam", task_id)
        leaves, structure = jax.tree.flatten(updates)
        uses = uses_of(leaves, task_id, inactive, split)
        factors = [
            jnp.asarray(_compensations(ratios, tasks, max_compensation))[task_id]
            for tasks in _users(len(leaves), ratios, inactive, split)
        ]
        moments = [structure.flatten_up_to(tree) for tree in state]
        found = zip(*map(advance, leaves, uses, factors, *moments))
        updates, *state = (structure.unflatten(x) for x in found)
        return updates, MTAdamWState(*state)

    return optax.GradientTransformationExtraArgs(init, update)


def uses_of(
    leaves: Sequence[Array],
    task_id: Array | int | None,
    inactive: Inactive,
    split: ParameterSplit | None,
) -> list[Array]:
    """For each leaf of a gradient, whether the task of the step changes its moments."""
    if inactive == "decay":
        return [jnp.array(True)] * len(leaves)
    if split is None:
        return [jnp.any(g != 0) for g in leaves]
    owners = split.owner_leaves()
    if len(owners) != len(leaves):
        raise ValueError(
            f"`split` must be that of the parameters, got {len(owners)} leaves for "
            f"{len(leaves)}; make it with `mtjax.parameter_split(losses_fn, params)`."
        )
    return [jnp.array([t in tasks for t in split.tasks])[task_id] for tasks in owners]


def _users(num_leaves, ratios, inactive, split):
    """For each leaf, which tasks share it."""
    if split is None or inactive == "decay":
        return [np.ones(len(ratios), bool)] * num_leaves
    return [np.array([t in o for t in split.tasks]) for o in split.owner_leaves()]


def _compensations(ratios, tasks, max_compensation):
    """The inverse ratios among the tasks of a leaf; those of others do not matter."""
    factors = np.sum(ratios[tasks]) / ratios
    return np.minimum(factors, max_compensation or np.inf).astype(np.float32)
