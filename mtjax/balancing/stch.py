"""STCH: smooth Tchebycheff scalarisation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer
from mtjax.balancing.scalarisation import check_eps, usable_losses


class STCHState(NamedTuple):
    """State of `stch`.

    Attributes:
      step: `()` int32, steps taken.
      sums: `(tasks,)` float32, losses summed for the nadir vector.
      counts: `(tasks,)` float32, how many.
    """

    step: Array
    sums: Array
    counts: Array


def stch(
    num_tasks: int,
    *,
    warmup_steps: int,
    nadir_steps: int | None = None,
    mu: float = 1.0,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Minimises a smooth maximum of the log-losses, counted from a nadir vector.

    First :math:`\sum_t \log L_t`. After the warm-up
    :math:`T \mu \log \sum_t \exp(\log(L_t / z_t) / \mu)`, which weighs each loss by
    :math:`T\, \mathrm{softmax}_t(\log(L / z) / \mu) / L_t`; the nadir :math:`z` is the
    mean of the losses late in the warm-up. The weights apply to shared and to
    task-specific parameters alike. Multiplying a loss by a positive number does not
    change the update.

    Args:
      num_tasks: number of tasks :math:`T`.
      warmup_steps: steps before the maximum, not negative. The paper takes 4 epochs.
      nadir_steps: the nadir is the mean over so many steps at the end of the warm-up; a
        quarter of them if not given, as in the paper.
      mu: :math:`\mu > 0`. A small one makes it the maximum, which moves only the task
        whose loss is largest relative to its nadir; with 1 it is the plain sum of
        :math:`L_t / z_t`, in logarithms.
      eps: smallest loss that is told apart, positive. A loss at or below it, negative
        ones included, counts as `eps`.

    Returns:
      A balancer with state, of the cost of one backward pass. Needs `losses`. For a
      task that was absent whenever the nadir was measured, its first loss is the nadir.

    Raises:
      ValueError: if an argument is out of its range, or `losses` are not passed to the
        update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = stch(2, warmup_steps=1)
      >>> _, state = tx.update(jnp.eye(2), tx.init(None), losses=jnp.array([2.0, 4.0]))
      >>> print(tx.update(jnp.eye(2), state, losses=jnp.array([1.0, 2.0]))[0])
      [1.  0.5]

    References:
      Smooth Tchebycheff Scalarization for Multi-Objective Optimization, 2024,
      equation 6 with equal preferences on log-losses, as in its experiments on
      multi-task learning. The bound `eps` is ours.
    """
    if warmup_steps < 0:
        raise ValueError(f"`warmup_steps` must not be negative, got {warmup_steps}.")
    if nadir_steps is None:
        nadir_steps = -(-warmup_steps // 4)
    if not min(warmup_steps, 1) <= nadir_steps <= warmup_steps:
        raise ValueError(
            f"`nadir_steps` must be from 1 to the {warmup_steps} `warmup_steps`, got "
            f"{nadir_steps}."
        )
    if mu <= 0:
        raise ValueError(f"`mu` must be positive, got {mu}.")
    check_eps(eps)

    def init(params):
        del params
        zeros = lambda: jnp.zeros(num_tasks, jnp.float32)
        return STCHState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, step):
        losses = usable_losses(step.losses, step.present, eps)
        early = state.step < warmup_steps
        late_in_warmup = early & (state.step >= warmup_steps - nadir_steps)
        wanted = late_in_warmup | (~early & (state.counts == 0))
        measured = wanted & step.present & jnp.isfinite(step.losses)
        sums = state.sums + jnp.where(measured, losses, 0.0)
        counts = state.counts + measured
        nadir = jnp.where(counts > 0, sums / jnp.maximum(counts, 1.0), 1.0)
        above = jnp.log(losses) - jnp.log(nadir)
        shares = jax.nn.softmax(above / mu, where=step.present)
        shares = jnp.where(early, 1.0, jnp.sum(step.present) * shares)
        state = STCHState(state.step + 1, sums, counts)
        return grads.scale(shares / losses).combine(), state

    return balancer("stch", init, update, num_tasks=num_tasks, needs=("losses",))
