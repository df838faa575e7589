"""The loop in which coefficients and masks of a merge are learnt."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jaxtyping import PyTree

State = TypeVar("State")
OnStep = Callable[[int, Any], None]
"""Called after steps with the number of the last one and what it reported."""


class Learned(NamedTuple):
    """What `learn` found.

    Attributes:
      variables: after the last step.
      reports: what the loss returned beside itself, stacked: `(steps, ...)`, each
        before its step.
      trajectory: the variables, `(steps + 1, ...)`, from the start to the end.
    """

    variables: PyTree
    reports: PyTree
    trajectory: PyTree


def learn(
    loss_fn: Callable[[PyTree, PyTree, Any], tuple[Any, Any]],
    variables: PyTree,
    frozen: PyTree,
    batches: Iterable[Any],
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    steps_per_call: int = 1,
    on_step: OnStep | None = None,
) -> Learned:
    """Descends in a few variables of a large model that itself stays as it is.

    Args:
      loss_fn: `loss_fn(variables, frozen, batch)` to the loss and a tree of reports.
      variables: where to start; few enough that all steps of them can be kept.
      frozen: arrays that the loss needs, such as base and task vectors.
      batches: as for `repeat_step`.
      steps: as there.
      optimizer: any.
      steps_per_call: as there.
      on_step: as there.

    Returns:
      The variables, and how they came about.

    Raises:
      ValueError: as `repeat_step` states.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda x, target, batch: ((x - target) ** 2, x)
      >>> start, goal, batches = jnp.array(0.0), jnp.array(3.0), [None] * 50
      >>> found = learn(
      ...     loss_fn, start, goal, batches, steps=50, optimizer=optax.sgd(0.1)
      ... )
      >>> print(f"{found.variables:.2f} {found.trajectory.shape}")
      3.00 (51,)
    """
    slopes_of = jax.grad(loss_fn, has_aux=True)

    def step(state, frozen, batch):
        now, opt_state = state
        slopes, report = slopes_of(now, frozen, batch)
        updates, opt_state = optimizer.update(slopes, opt_state, now)
        new = optax.apply_updates(now, updates)
        return (new, opt_state), (report, new)

    told = None if on_step is None else lambda i, found: on_step(i, found[0])
    (found, _), (reports, path) = repeat_step(
        step,
        (variables, optimizer.init(variables)),
        frozen,
        batches,
        steps=steps,
        steps_per_call=steps_per_call,
        on_step=told,
    )
    longer = lambda first, rest: np.concatenate([np.asarray(first)[None], rest])
    return Learned(found, reports, jax.tree.map(longer, variables, path))


def repeat_step(
    step: Callable[[State, PyTree, Any], tuple[State, Any]],
    state: State,
    frozen: PyTree,
    batches: Iterable[Any],
    *,
    steps: int,
    steps_per_call: int = 1,
    on_step: OnStep | None = None,
) -> tuple[State, PyTree]:
    """Runs a pure step many times, compiled once.

    Args:
      step: `step(state, frozen, batch)` to the next state and a tree of reports.
      state: the first one.
      frozen: arrays that every step needs; handed over, not baked in.
      batches: trees of arrays, at least one per step, all of one structure and shape.
      steps: at least one.
      steps_per_call: so many run in one `jax.lax.scan`, without Python in between: good
        for small dense models, and very slow on CPUs if the model convolves.
      on_step: called after every call, for progress bars and logs.

    Returns:
      The last state, and the reports of all steps, stacked on a leading axis.

    Raises:
      ValueError: if there are fewer batches than steps, or none.
    """
    run = jax.jit(lambda state, frozen, batch: step(state, frozen, batch))

    @jax.jit
    def run_several(state, frozen, rows):
        return jax.lax.scan(lambda s, row: step(s, frozen, row), state, rows)

    reports, done, rest = [], 0, iter(batches)
    while done < steps:
        rows = list(islice(rest, min(steps_per_call, steps - done)))
        if not rows:
            break
        if steps_per_call == 1:
            state, report = run(state, frozen, rows[0])
            several = jax.tree.map(lambda x: x[None], report)
        else:
            stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
            state, several = run_several(state, frozen, stacked)
            report = jax.tree.map(lambda x: x[-1], several)
        done += len(rows)
        reports.append(several)
        if on_step is not None:
            on_step(done - 1, report)
    if done < max(steps, 1):
        raise ValueError(
            f"`batches` must yield one batch for each of {steps} steps, at least one, "
            f"got {done}; give an endless iterator."
        )
    together = lambda *x: np.concatenate(x)
    return state, jax.tree.map(together, *jax.device_get(reports))
