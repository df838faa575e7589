"""FAMO: fast adaptive multitask optimization."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, keep_absent, loss_vector
from mtjax.balancing.learnt import train_per_task


class FAMOState(NamedTuple):
    """State of `famo`.

    Attributes:
      logits: `(tasks,)` float32, whose softmax are the task weights.
      logits_opt_state: state of the logits' optimizer.
      last_losses: `(tasks,)` float32, losses one step ago; NaN if never seen.
      opt_state: state of the wrapped optimizer, empty if there is none.
    """

    logits: Array
    logits_opt_state: Any
    last_losses: Array
    opt_state: Any


def famo(
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    learning_rate: float = 0.025,
    weight_decay: float = 1e-3,
    min_losses: float = 0.0,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Decreases the logarithms of all losses at the same rate, at the cost of one.

    With :math:`z = \mathrm{softmax}(w)` and :math:`D_t = L_t - L_t^{\min} + \epsilon`
    the loss weights are :math:`c\, z_t / D_t`, where
    :math:`c = 1 / \sum_t (z_t / D_t)`. After the step, :math:`w` moves by Adam against
    :math:`J_{\mathrm{softmax}}(w)^\top \delta` with
    :math:`\delta_t = \log D_t^{\text{before}} - \log D_t^{\text{after}}`: tasks that
    improved most lose weight. The weights apply to shared and to task-specific
    parameters alike.

    Args:
      num_tasks: number of tasks.
      optimizer: if given, `famo` wraps it instead of standing before it:
        `tx = famo(2, optimizer=optax.adam(1e-3))`. It then evaluates the losses again
        on the same batch after the step, as the paper does (one more forward pass), and
        needs `losses_fn`. If not, the next batch's losses serve as those after the
        step, which costs nothing and is noisier.
      learning_rate: of :math:`w`.
      weight_decay: of :math:`w`, added to its gradient.
      min_losses: :math:`L^{\min}`, a lower bound of all losses.
      eps: :math:`\epsilon`.

    Returns:
      A balancer with state. Needs `losses`; with `optimizer` also `losses_fn` and
      `params`.

    Raises:
      ValueError: if a rate is negative, or a needed argument is not passed to the
        update.

    References:
      FAMO: Fast Adaptive Multitask Optimization, 2023, algorithm 1. A loss at or below
      `min_losses` counts as `eps` above it.
    """
    for name, value in (("learning_rate", learning_rate), ("eps", eps)):
        if value <= 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if weight_decay < 0:
        raise ValueError(f"`weight_decay` must not be negative, got {weight_decay}.")
    logits_optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(learning_rate)
    )
    inner = optax.identity() if optimizer is None else optimizer
    inner = optax.with_extra_args_support(inner)

    def init(params):
        logits = jnp.zeros(num_tasks, jnp.float32)
        return FAMOState(
            logits=logits,
            logits_opt_state=logits_optimizer.init(logits),
            last_losses=jnp.full(num_tasks, jnp.nan, jnp.float32),
            opt_state=inner.init(params),
        )

    def gaps(losses):
        return jnp.maximum(losses - min_losses, 0.0) + eps

    def move_logits(state, before, after, present):
        seen = present & jnp.isfinite(before) & jnp.isfinite(after)
        delta = jnp.where(seen, jnp.log(gaps(before)) - jnp.log(gaps(after)), 0.0)
        softmax = functools.partial(jax.nn.softmax, where=seen)
        _, softmax_vjp = jax.vjp(softmax, state.logits)
        (slope,) = softmax_vjp(delta)
        logits, opt_state = train_per_task(
            logits_optimizer, slope, state.logits, state.logits_opt_state, seen
        )
        return state._replace(logits=logits, logits_opt_state=opt_state)

    def update(grads, state, step):
        if optimizer is None:
            state = move_logits(state, state.last_losses, step.losses, step.present)
        z = jax.nn.softmax(state.logits, where=step.present)
        ratios = jnp.where(step.present, z / gaps(step.losses), 0.0)
        total = jnp.sum(ratios)
        weights = ratios / jnp.where(total > 0, total, 1.0)
        updates = grads.scale(weights).combine()
        known = step.present & jnp.isfinite(step.losses)
        state = state._replace(
            last_losses=keep_absent(step.losses, state.last_losses, known)
        )
        if optimizer is None:
            return updates, state
        if step.params is None:
            raise ValueError("`famo` with an `optimizer` needs `params` in the update.")
        updates, opt_state = inner.update(updates, state.opt_state, step.params)
        after = step.losses_fn(optax.apply_updates(step.params, updates))
        after = loss_vector(after, grads.tasks)
        state = move_logits(state, step.losses, after, step.present)
        return updates, state._replace(opt_state=opt_state)

    needs = ("losses",) if optimizer is None else ("losses", "losses_fn")
    return balancer("famo", init, update, num_tasks=num_tasks, needs=needs)
