"""Task-based flat regions: sharpness-aware gradients per task, for any balancer."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax.balancing.balancer import balancer, check_choice
from mtjax.gradients import ParameterSplit, TaskGradients
from mtjax.transforms.perturbation import (
    check_params,
    check_radius,
    gradients_at,
    moved,
    rows_of_present,
    uphill,
)

Mode = Literal["decomposed", "direct", "second", "each", "erm"]
_PARTS = ("flat", "loss")


class TaskSAMState(NamedTuple):
    """State of `task_sam`: one of the wrapped balancer for each use of it.

    Attributes:
      loss: of its use on the tasks' loss parts, or on their whole gradients in the
        modes "direct" and "each".
      flat: of its use on the tasks' flat parts; empty in other modes.
      pair: of its use on pairs of a loss part and a flat part; empty in other modes.
    """

    loss: Any
    flat: Any
    pair: Any


def task_sam(
    aggregator: optax.GradientTransformation,
    *,
    rho_shared: float = 2.0,
    rho_own: float = 2.0,
    adaptive: bool = True,
    mode: Mode = "decomposed",
    joint_norm: bool = False,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leads each task to a flat region: balances losses and sharpnesses by themselves.

    Each task has a perturbation of its own, :math:`\epsilon_i = \rho\, g_i / \|g_i\|`
    with the gradient :math:`g_i` of its loss (with `adaptive`
    :math:`\rho\, \theta^2 \odot g_i / \| |\theta| \odot g_i \|`), with separate norms
    and radii on shared and on its own parameters. The gradient there,
    :math:`g_i^{SAM} = \nabla L_i(\theta + \epsilon_i)`, has a loss part :math:`g_i` and
    a flat part :math:`g_i^{SAM} - g_i`. The update on shared parameters is
    :math:`A(g_1, \dots, g_T) + A(g_1^{SAM} - g_1, \dots, g_T^{SAM} - g_T)` with the
    wrapped balancer :math:`A`; parameters of one task follow their
    :math:`g_i^{SAM}`.

    A step evaluates the losses at one point per task: it costs twice the backward
    passes of K separate gradients, and memory of 3 K gradients. The compiled program
    grows with K.

    Args:
      aggregator: a balancer, or a chain of per-task transforms and a balancer, without
        optimizer. If it is blind to the scale of all gradients, as `mtjax.nash_mtl` is,
        flat parts weigh as much as loss parts however flat the region is.
      rho_shared: radius :math:`\rho` on shared parameters, at least 0; relative to the
        parameters' size if `adaptive`, otherwise 0.05 is a usual value.
      rho_own: radius on each task's own parameters. With a single task all are its own.
      adaptive: whether perturbations are relative to the size of each parameter.
      mode: "decomposed" as above; "direct": :math:`A` of the :math:`g_i^{SAM}`;
        "second": :math:`A` of the two sums' terms instead of their sum; "each":
        :math:`A` of each task's two parts, then over tasks; "erm": the `aggregator`
        itself. "second" and "each" need an `aggregator` for any number of tasks that
        looks at gradients alone.
      joint_norm: one norm over shared and own parameters together.
      axis_name: inside `shard_map` or `pmap`, the axis over which the batch is split,
        as in `mtjax.value_and_task_grads`. The tasks' gradients must be averaged over
        it already, as they are there, because :math:`\epsilon` needs the average.

    Returns:
      A balancer that needs `losses_fn` and `params`. Both uses of `aggregator` have
      their own state. They get the same `losses`, `present` and `key`, so a random
      one draws the same numbers in both; "each" hands one state on from task to task.
      With gradient accumulation :math:`\epsilon` is that of the whole batch.

    Raises:
      ValueError: if a radius is negative, `mode` unknown, or a needed argument is not
        passed to the update.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> def losses_fn(params):
      ...     return {"a": 0.5 * params @ params, "b": 2.0 * params @ params}
      >>> params = jnp.array([3.0, 4.0])
      >>> tx = task_sam(mtjax.equal(), rho_shared=0.5, adaptive=False)
      >>> losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
      >>> updates, _ = tx.update(
      ...     grads, tx.init(params), params, losses_fn=losses_fn
      ... )
      >>> print(updates)
      [16.5 22. ]

    References:
      Improving Multi-task Learning via Seeking Task-based Flat Regions, 2022,
      algorithm 1. Defaults are those of its published code, which on MultiMNIST has
      `joint_norm`. `losses_fn` returns losses alone, so that batch statistics are those
      of the unperturbed pass; dropout must be the same in both, as it is in
      `mtjax.training.make_train_step`.
    """
    check_radius("rho_shared", rho_shared)
    check_radius("rho_own", rho_own)
    check_choice("mode", mode, ("decomposed", "direct", "second", "each", "erm"))
    inner = optax.with_extra_args_support(aggregator)
    if mode == "erm":
        return inner

    def init(params):
        return TaskSAMState(
            loss=inner.init(params),
            flat=inner.init(params) if mode in ("decomposed", "second") else (),
            pair=inner.init(params) if mode in ("second", "each") else (),
        )

    def perturbed(loss_parts, grads, step):
        def point(i):
            steps = uphill(
                _row(loss_parts, i),
                step.params,
                grads.shared,
                rho_shared=rho_shared,
                rho_own=rho_own,
                adaptive=adaptive,
                joint_norm=joint_norm,
            )
            return moved(step.params, steps)

        points = [point(i) for i in range(len(grads.tasks))]
        there = gradients_at(points, step.losses_fn, grads.tasks, axis_name)
        return rows_of_present(there, step.present, grads.factors)

    def update(grads, state, step):
        check_params("task_sam", step.params)
        ones = jnp.ones(len(grads.tasks), jnp.float32)
        loss_parts = rows_of_present(grads.stack(), step.present, ones)
        whole = perturbed(loss_parts, grads, step)

        def over_tasks(rows, state):
            return inner.update(
                _wrapped(rows, grads.split),
                state,
                step.params,
                losses=step.losses,
                present=step.present,
                key=step.key,
                losses_fn=step.losses_fn,
                validation_losses_fn=step.validation_losses_fn,
            )

        def over_parts(flat, loss, state, present):
            rows = jax.tree.map(lambda *parts: jnp.stack(parts), flat, loss)
            owners = jax.tree.map(lambda _: _PARTS, grads.shared)
            return inner.update(
                _wrapped(rows, ParameterSplit(_PARTS, owners, grads.shared)),
                state,
                step.params,
                present=jnp.stack([present, present]),
                key=step.key,
            )

        if mode == "direct":
            updates, loss_state = over_tasks(whole, state.loss)
            return updates, state._replace(loss=loss_state)
        flat_parts = jax.tree.map(jnp.subtract, whole, loss_parts)
        if mode == "each":
            merged, pair_state = [], state.pair
            for i in range(len(grads.tasks)):
                flat, loss = (_row(rows, i) for rows in (flat_parts, loss_parts))
                row, pair_state = over_parts(flat, loss, pair_state, step.present[i])
                merged.append(row)
            rows = jax.tree.map(lambda *g: jnp.stack(g), *merged)
            updates, loss_state = over_tasks(rows, state.loss)
            return updates, TaskSAMState(loss_state, (), pair_state)
        loss_update, loss_state = over_tasks(loss_parts, state.loss)
        flat_update, flat_state = over_tasks(flat_parts, state.flat)
        if mode == "decomposed":
            updates = jax.tree.map(jnp.add, loss_update, flat_update)
            return updates, TaskSAMState(loss_state, flat_state, ())
        updates, pair_state = over_parts(
            flat_update, loss_update, state.pair, jnp.any(step.present)
        )
        return updates, TaskSAMState(loss_state, flat_state, pair_state)

    return balancer("task_sam", init, update, needs=("losses_fn",))


def _row(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda g: g[i], stacked)


def _wrapped(rows: Any, split: ParameterSplit) -> Any:
    # optax types gradients as trees of arrays, which `TaskGradients` is not.
    return TaskGradients.from_stacked(rows, split=split)
