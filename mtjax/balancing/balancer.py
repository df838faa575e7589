"""What every balancer shares: the optax protocol around a rule for combining tasks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float

from mtjax.gradients import TaskGradients

PyTree = Any


class Step(NamedTuple):
    """What a balancer knows about a step beside the gradients.

    Attributes:
      params: the parameters, None if the caller did not pass them.
      losses: `(tasks,)` float32, None if the caller did not pass them.
      present: `(tasks,)` bool, True for tasks that the batch has labels for.
      key: a random key, None if the caller did not pass one.
      losses_fn: the losses as a function of the parameters alone, or None.
      validation_losses_fn: the same on held-out data, or None.
      resampled: task gradients of further batches, drawn independently of this one.
    """

    params: PyTree
    losses: Array | None
    present: Array
    key: Array | None
    losses_fn: Callable[[PyTree], Mapping[str, Array]] | None
    validation_losses_fn: Callable[[PyTree], Mapping[str, Array]] | None = None
    resampled: tuple[TaskGradients, ...] = ()


def balancer(
    name: str,
    init: Callable[..., Any],
    update: Callable[[TaskGradients, Any, Step], tuple[Any, Any]],
    *,
    num_tasks: int | None = None,
    needs: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Makes an optax transform of a rule on `TaskGradients`.

    Args:
      name: the factory's name, for error messages.
      init: `init(params) -> state`.
      update: `update(grads, state, step) -> (updates, state)`, where the gradients of
        absent tasks are scaled by zero already. It returns a params-shaped update, or
        `TaskGradients` if it keeps tasks apart.
      num_tasks: what the factory was told, to check the gradients against.
      needs: the extra arguments that must be passed, among "losses", "losses_fn",
        "validation_losses_fn" and "resampled".

    Returns:
      A transform that takes `TaskGradients` or plain gradients with a leading task
      axis. Its update takes `losses` (mapping or `(tasks,)` array), `present`
      (`(tasks,)` mask), `key`, `losses_fn`, `validation_losses_fn` and `resampled`
      (a sequence of `TaskGradients`), and ignores other extra arguments.

    Raises:
      ValueError: at update time, if the number or the names of tasks do not match, or
        if a needed extra argument is missing.
    """
    if num_tasks is not None and num_tasks < 1:
        raise ValueError(
            f"`num_tasks` of `{name}` must be at least 1, got {num_tasks}."
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        losses=None,
        present=None,
        key=None,
        losses_fn=None,
        validation_losses_fn=None,
        resampled=(),
        **extra_args,
    ):
        del extra_args
        grads = updates
        if not isinstance(grads, TaskGradients):
            names = tuple(sorted(losses)) if isinstance(losses, Mapping) else None
            grads = TaskGradients.from_stacked(updates, names)
        if num_tasks is not None and len(grads.tasks) != num_tasks:
            raise ValueError(
                f"`num_tasks` of `{name}` must be the number of tasks, got {num_tasks} "
                f"for the {len(grads.tasks)} tasks {grads.tasks}."
            )
        given = {
            "losses": losses,
            "losses_fn": losses_fn,
            "validation_losses_fn": validation_losses_fn,
            "resampled": resampled or None,
        }
        for argument in needs:
            if given[argument] is None:
                raise ValueError(
                    f"`{name}` needs the extra argument `{argument}`; call "
                    f"`tx.update(grads, state, params, {argument}={argument})`."
                )
        if losses is not None:
            losses = loss_vector(losses, grads.tasks)
        if present is None:
            present = jnp.ones(len(grads.tasks), bool)
        else:
            present = jnp.asarray(present, bool)
            if present.shape != (len(grads.tasks),):
                raise ValueError(
                    "`present` must have one entry for each of the tasks "
                    f"{grads.tasks}, got shape {present.shape}; pass a mask in the "
                    "order of the sorted task names."
                )
            mask = present.astype(jnp.float32)
            grads = grads.scale(mask)
            resampled = [other.scale(mask) for other in resampled]
        step = Step(
            params,
            losses,
            present,
            key,
            losses_fn,
            validation_losses_fn,
            tuple(resampled),
        )
        return update(grads, state, step)

    return optax.GradientTransformationExtraArgs(init, update_fn)


def gramian_balancer(
    name: str,
    weigh: Callable[[Float[Array, "tasks tasks"], Step], Float[Array, " tasks"]],
) -> optax.GradientTransformationExtraArgs:
    """Makes a stateless balancer of a rule from the Gramian to weights.

    Args:
      name: the factory's name, for error messages.
      weigh: `weigh(gramian, step) -> weights`; rows and columns of absent tasks are
        zero in `gramian`, whatever their gradients were.

    Returns:
      The transform: weighted sum on shared parameters, each task's own gradient on its
      own parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> def normalised_sum():
      ...     def weigh(gramian, step):
      ...         norms = jnp.sqrt(jnp.diagonal(gramian))
      ...         return jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
      ...     return gramian_balancer("normalised_sum", weigh)
      >>> tx = normalised_sum()
      >>> grads = jnp.array([[3.0, 4.0], [0.0, 2.0]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [0.6 1.8]
    """

    def update(grads, state, step):
        return grads.combine(weigh(masked_gramian(grads, step), step)), state

    return balancer(name, lambda params: optax.EmptyState(), update)


def masked_gramian(grads: TaskGradients, step: Step) -> Float[Array, "tasks tasks"]:
    """The Gramian with zeros for absent tasks, even if their gradients are NaN."""
    both = step.present[:, None] & step.present[None, :]
    return jnp.where(both, grads.gramian(), 0.0)


def loss_vector(
    losses: Mapping[str, Array] | Array, tasks: tuple[str, ...]
) -> Float[Array, " tasks"]:
    """Orders losses like the tasks.

    Raises:
      ValueError: if `losses` are not one scalar for each of the tasks.
    """
    if isinstance(losses, Mapping):
        if set(losses) != set(tasks):
            raise ValueError(
                f"`losses` must have exactly the tasks {tasks}, got "
                f"{tuple(sorted(losses))}."
            )
        losses = jnp.stack([jnp.asarray(losses[task]) for task in tasks])
    losses = jnp.asarray(losses, jnp.float32)
    if losses.shape != (len(tasks),):
        raise ValueError(
            f"`losses` must be one scalar for each of the tasks {tasks}, got shape "
            f"{losses.shape}."
        )
    return losses


def mean_over_present(
    values: Float[Array, " tasks"], present: Bool[Array, " tasks"]
) -> Float[Array, ""]:
    """Mean over the tasks that are present, zero if none is."""
    total = jnp.sum(jnp.where(present, values, 0.0))
    return total / jnp.maximum(jnp.sum(present), 1)


def keep_absent(
    new: Float[Array, " tasks"],
    old: Float[Array, " tasks"],
    present: Bool[Array, " tasks"],
) -> Float[Array, " tasks"]:
    """Per-task state that moves only for tasks that are present."""
    return jnp.where(present, new, old)


def keep_moments(
    optimizer: optax.GradientTransformation,
    new: PyTree,
    old: PyTree,
    moves: PyTree,
    *,
    others: Array | bool = True,
) -> PyTree:
    """State of an optimizer of which only some parameters moved.

    Args:
      optimizer: whose state it is.
      new: its state after the step.
      old: its state before.
      moves: params-shaped, masks or booleans that say where moments are the new ones.
      others: whether leaves that belong to no parameter, such as counters, are.

    Returns:
      A state of the same structure.
    """
    # Inside `optax.masked` and `optax.multi_transform` some parameters have no state.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    moves = optax.tree.map_params(
        optimizer.init,
        lambda x, m: x if is_masked(x) else m,
        new,
        moves,
        transform_non_params=lambda _: others,
        is_leaf=is_masked,
    )
    return jax.tree.map(
        lambda m, n, o: n if m is True else jnp.where(m, n, o), moves, new, old
    )


def check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{argument}` must be one of {choices}, got {value!r}.")


def check_task(argument: str, task: str | int, num_tasks: int) -> None:
    """Raises ValueError if a place among the tasks is none; names are not known yet."""
    if not isinstance(task, str) and not 0 <= task < num_tasks:
        raise ValueError(
            f"`{argument}` must be a task's name or a place from 0 to {num_tasks - 1}, "
            f"got {task}."
        )


def place_of(argument: str, task: str | int, tasks: tuple[str, ...]) -> int:
    """The place of a task that is given by name or place; ValueError if unknown."""
    if not isinstance(task, str):
        return task
    check_choice(argument, task, tasks)
    return tasks.index(task)


def check_preference(
    preference: ArrayLike | Sequence[float | int], num_tasks: int | None = None
) -> Float[np.ndarray, " tasks"]:
    """Checks what a user prefers: one weight per task, in the order of the names.

    Args:
      preference: the weights, of any scale.
      num_tasks: how many there must be, where that is known.

    Returns:
      The weights, float32.

    Raises:
      ValueError: if they are not `(tasks,)`, negative, not finite or all zero.
    """
    values = np.asarray(preference, np.float32)
    if values.ndim != 1 or num_tasks not in (None, len(values)):
        tasks = "tasks" if num_tasks is None else f"{num_tasks} tasks"
        raise ValueError(
            f"`preference` must have one entry for each of the {tasks}, got shape "
            f"{values.shape}; pass one weight per task in the order of the sorted "
            "task names."
        )
    if not np.all(np.isfinite(values)):
        raise ValueError(f"`preference` must be finite, got {values.tolist()}.")
    if np.any(values < 0):
        raise ValueError(
            f"`preference` must not be negative, got {values.tolist()}; use 0 for a "
            "task that the others are not to be balanced with."
        )
    if not np.any(values > 0):
        raise ValueError(
            f"`preference` must have a positive entry, got {values.tolist()}."
        )
    return values


def default_key(key: Array | None) -> Array:
    """The key that a stochastic balancer starts from if the user gave none."""
    return jax.random.key(0) if key is None else key
