"""Dynamic weight average."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer


class DWAState(NamedTuple):
    """State of `dwa`.

    Attributes:
      step: `()` int32, steps taken.
      sums: `(tasks,)` float32, losses summed over this epoch.
      counts: `(tasks,)` float32, steps of this epoch in which the task was present.
      last: `(tasks,)` float32, mean losses of the epoch before; NaN if never seen.
      before_last: `(tasks,)` float32, and of the one before that.
    """

    step: Array
    sums: Array
    counts: Array
    last: Array
    before_last: Array


def dwa(
    num_tasks: int, steps_per_epoch: int, *, temperature: float = 2.0
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs tasks by how slowly their losses have fallen of late.

    In epoch :math:`e`, :math:`w_t = T\, \mathrm{softmax}_t(r_t / \tau)` with
    :math:`r_t = \bar L_t(e-1) / \bar L_t(e-2)`, ratios of mean losses over epochs. The
    weights are all one in the first two epochs, and constant within an epoch; they
    apply to shared and to task-specific parameters alike.

    Args:
      num_tasks: number of tasks :math:`T`.
      steps_per_epoch: number of steps that losses are averaged over, at least 1.
      temperature: :math:`\tau > 0`; large values make the weights equal.

    Returns:
      A balancer with state, of the cost of one backward pass. Needs `losses`.

    Raises:
      ValueError: if an argument is out of its range, or `losses` are not passed to the
        update.

    References:
      End-to-End Multi-Task Learning with Attention, 2019, equation 7. A task that was
      absent for a whole epoch keeps its latest mean loss, so its ratio is one.
    """
    if steps_per_epoch < 1:
        raise ValueError(
            f"`steps_per_epoch` must be at least 1, got {steps_per_epoch}."
        )
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")

    def init(params):
        del params
        zeros = lambda: jnp.zeros(num_tasks, jnp.float32)
        unseen = lambda: jnp.full(num_tasks, jnp.nan, jnp.float32)
        # An array per field: a buffer that two fields share cannot be donated.
        return DWAState(jnp.zeros((), jnp.int32), zeros(), zeros(), unseen(), unseen())

    def weigh(state, present):
        ratios = state.last / state.before_last
        ratios = jnp.where(jnp.isfinite(ratios), ratios, 1.0)
        shares = jax.nn.softmax(ratios / temperature, where=present)
        return jnp.sum(present) * shares

    def update(grads, state, step):
        weights = weigh(state, step.present)
        measured = step.present & jnp.isfinite(step.losses)
        sums = state.sums + jnp.where(measured, step.losses, 0.0)
        counts = state.counts + measured
        ends = (state.step + 1) % steps_per_epoch == 0
        seen = counts > 0
        mean = jnp.where(seen, sums / jnp.maximum(counts, 1.0), state.last)
        before = jnp.where(seen, state.last, state.before_last)
        state = DWAState(
            step=state.step + 1,
            sums=jnp.where(ends, 0.0, sums),
            counts=jnp.where(ends, 0.0, counts),
            last=jnp.where(ends, mean, state.last),
            before_last=jnp.where(ends, before, state.before_last),
        )
        return grads.scale(weights).combine(), state

    return balancer("dwa", init, update, num_tasks=num_tasks, needs=("losses",))
