"""Training with one task per step."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from mtjax.training.step import StepFn, make_train_step


def make_unmixed_step(
    loss_fns: Mapping[str, Callable[..., Any]],
    tx: optax.GradientTransformation,
    *,
    with_model_state: bool = False,
    has_aux: bool = False,
    **options: Any,
) -> StepFn:
    """Builds ``step(state, batch) -> (state, metrics)`` for batches of one task each.

    A batch is ``{task: rows}`` with a single task, as
    ``mtjax.data.mixture(..., batches="single_task")`` gives them. What the step
    computes is compiled once per task, so that shapes may differ from task to task,
    and only the loss of that task is evaluated. All share one state.

    Args:
      loss_fns: ``loss(params, rows) -> scalar`` by task name; with the flags of
        `make_train_step` they take the same keyword arguments and return as much more.
      tx: an optimizer for plain gradients, without a balancer, such as
        `mtjax.mt_adamw` or ``optax.adamw(1e-3)``. Its update gets `task_id`, the place
        of the task among the sorted names, beside the arguments of `make_train_step`.
      with_model_state: see `make_train_step`.
      has_aux: see `make_train_step`.
      **options: all other options of `make_train_step`. With ``accumulate`` the
        gradient of the one task is averaged before ``tx`` sees it.

    Returns:
      The step; ``metrics["losses"]`` holds the loss of the task.

    Raises:
      ValueError: if ``loss_fns`` is empty; when called, if a batch does not hold
        exactly one of the tasks.

    Example:
      >>> import jax, jax.numpy as jnp, mtjax
      >>> from mtjax.training import TrainState
      >>> loss_fns = {
      ...     "a": lambda params, x: jnp.mean((x - params) ** 2),
      ...     "b": lambda params, x: 100.0 * jnp.mean((x + params) ** 2),
      ... }
      >>> tx = mtjax.mt_adamw(0.1, {"a": 0.5, "b": 0.5})
      >>> state = TrainState.create(jnp.zeros(()), tx, key=jax.random.key(0))
      >>> step = make_unmixed_step(loss_fns, tx)
      >>> for batch in ({"a": jnp.ones(4)}, {"b": jnp.ones(2)}):
      ...     state, metrics = step(state, batch)
      ...     print({task: float(loss) for task, loss in metrics["losses"].items()})
      {'a': 1.0}
      {'b': 130.2...}
    """
    if not loss_fns:
        raise ValueError("`loss_fns` must hold at least one task, got none.")
    tasks = tuple(sorted(loss_fns))
    optimizer = optax.with_extra_args_support(tx)

    def losses_fn(params, batch, **inputs):
        if len(batch) != 1 or not set(batch) <= set(tasks):
            raise ValueError(
                f"`batch` must hold exactly one of the tasks {tasks}, got "
                f"{tuple(sorted(batch))}; see `mixture(batches='single_task')`."
            )
        ((task, rows),) = batch.items()
        found = loss_fns[task](params, rows, **inputs)
        if with_model_state or has_aux:
            return {task: found[0]}, found[1]
        return {task: found}

    def update(updates, state, params=None, **extra_args):
        (task,) = extra_args["losses"]
        return optimizer.update(
            updates.combine(),
            state,
            params,
            task_id=tasks.index(task),
            **extra_args,
        )

    return make_train_step(
        losses_fn,
        optax.GradientTransformationExtraArgs(tx.init, update),
        with_model_state=with_model_state,
        has_aux=has_aux,
        **options,
    )
