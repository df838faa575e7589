"""FORUM: first-order multi-gradient bi-level learning of loss weights."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import balancer, loss_vector
from mtjax.balancing.bilevel import (
    for_optimizer,
    held_out_losses,
    look_ahead,
    params_of,
)
from mtjax.balancing.cosines import cosines
from mtjax.balancing.learnt import train_per_task
from mtjax.balancing.simplex import redistribute, shares
from mtjax.balancing.solvers import bounded_qp, full_precision
from mtjax.gradients import value_and_task_grads

# Halvings of a bracket a few units wide, down to float32's precision.
_BISECTIONS = 30


class FORUMState(NamedTuple):
    """State of `forum`.

    Attributes:
      step: `()` int32, steps taken.
      logits: `(tasks,)` float32, whose softmax are the loss weights.
      opt_state: state of their optimizer.
      weights: `(tasks,)` float32, averaged weights of the held-out gradients.
    """

    step: Array
    logits: Array
    opt_state: Any
    weights: Array


def forum(
    num_tasks: int,
    *,
    inner_learning_rate: float = 0.1,
    inner_steps: int = 5,
    phi: float = 0.1,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lowers all held-out losses while the weighted losses stay near their minimum.

    With :math:`f(\alpha, \theta) = \sum_t \mathrm{softmax}(\alpha)_t L_t(\theta)` and
    :math:`\theta_T`, which is :math:`\theta` after :math:`T` steps of SGD on it,
    :math:`q = f(\alpha, \theta) - f(\alpha, \theta_T)` says how far :math:`\theta` is
    from the minimum. Parameters and :math:`\alpha` move along
    :math:`\sum_i \lambda_i \nabla F_i + \nu \nabla q`, where :math:`F_i` are the
    held-out losses, each gradient divided by its norm, and :math:`\theta_T` counts as
    constant: no second derivative is needed. The weights solve
    :math:`\min_{\lambda \in \Delta, \nu \ge 0} \tfrac12 \|\sum_i \lambda_i \nabla F_i +
    \nu \nabla q\|^2 - \nu \phi \|\nabla q\|^2`, the dual of the steepest common descent
    :math:`d` of all :math:`F_i` that has :math:`\langle \nabla q, d \rangle \le
    -\phi \|\nabla q\|^2`. In step :math:`k` their average moves by :math:`k^{-3/4}` of
    the way.

    Args:
      num_tasks: number of tasks.
      inner_learning_rate: of SGD, positive.
      inner_steps: :math:`T`, at least 1: so many more evaluations of the losses, all
        but the last with their gradient.
      phi: :math:`\phi`, positive: how fast :math:`q` must fall.
      optimizer: of :math:`\alpha`; Adam with learning rate 1e-3 if not given.

    Returns:
      A balancer with state. Needs `losses`, `losses_fn`, `validation_losses_fn` and
      `params`. Unlike with other balancers, it is the held-out data that move the
      parameters, shared and task-specific ones alike; keep other data to validate on.
      Costs one backward pass per task on held-out data beside the inner steps.

    Raises:
      ValueError: if an argument is out of its range, or what is needed is not passed to
        the update.

    References:
      A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level Optimization,
      2024, algorithm 1, on its multi-task problem. Norms are divided out as in the
      public code, which averages by epochs; the problem in :math:`\lambda` and
      :math:`\nu` is solved by bisection, every step of which has an exact solution.
      An absent task counts neither in the batch nor on held-out data.
    """
    for name, value in (("inner_learning_rate", inner_learning_rate), ("phi", phi)):
        if value <= 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if inner_steps < 1:
        raise ValueError(f"`inner_steps` must be at least 1, got {inner_steps}.")
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer

    def init(params):
        del params
        logits = jnp.zeros(num_tasks, jnp.float32)
        weights = jnp.full(num_tasks, 1.0 / num_tasks, jnp.float32)
        return FORUMState(
            jnp.zeros((), jnp.int32), logits, optimizer.init(logits), weights
        )

    def slopes_of_gap(grads, state, step, params):
        """The gradient of q by the parameters and by the logits."""
        softmax = functools.partial(jax.nn.softmax, where=step.present)
        weights, pullback = jax.vjp(softmax, state.logits)
        ahead = look_ahead(
            grads, step, params, weights, inner_learning_rate, inner_steps
        )
        after = loss_vector(step.losses_fn(ahead), grads.tasks)
        gap = jnp.where(step.present, step.losses - after, 0.0)
        by_logits = for_optimizer(pullback(gap)[0], jnp.max(jnp.abs(gap)))
        return grads.scale(weights).combine(), by_logits

    def update(grads, state, step):
        params = params_of(step, "forum")
        by_params, by_logits = slopes_of_gap(grads, state, step, params)
        held_out_fn = lambda params: dict(
            zip(grads.tasks, held_out_losses(step, params, grads.tasks))
        )
        # Every parameter counts as shared: all are weighted.
        grad_fn = value_and_task_grads(held_out_fn, shared=lambda path: True)
        _, held_out = grad_fn(params)
        matrix, norms, active = cosines(held_out.gramian())
        length = optax.tree.norm((by_params, by_logits)).astype(jnp.float32)
        unit = jnp.where(length > 0, length, 1.0)
        towards = jnp.where(active, held_out.inner(by_params) / norms / unit, 0.0)
        best = balanced(matrix, towards, phi * length, active)
        count = state.step + 1
        now = shares(state.weights, step.present)
        new = now + (best - now) / count**0.75
        nu = jnp.maximum(phi * length - jnp.sum(new * towards), 0.0) / unit
        updates = jax.tree.map(
            lambda outer, inner: (outer + nu * inner).astype(inner.dtype),
            held_out.scale(jnp.where(active, new / norms, 0.0)).combine(),
            by_params,
        )
        slopes = for_optimizer(nu * by_logits)
        moves = step.present & jnp.isfinite(slopes)
        return updates, FORUMState(
            count,
            *train_per_task(optimizer, slopes, state.logits, state.opt_state, moves),
            redistribute(state.weights, new, step.present),
        )

    needs = ("losses", "losses_fn", "validation_losses_fn")
    return balancer("forum", init, update, num_tasks=num_tasks, needs=needs)


@full_precision
def balanced(
    matrix: Float[Array, "tasks tasks"],
    towards: Float[Array, " tasks"],
    fall: Float[Array, ""],
    active: Bool[Array, " tasks"],
) -> Float[Array, " tasks"]:
    r"""Weights :math:`\lambda` of the steepest common descent with a constraint.

    Args:
      matrix: cosines of the tasks' gradients.
      towards: their cosines with the constraint's gradient.
      fall: how much a step along the constraint's unit gradient must be.
      active: tasks that may have a weight.

    Returns:
      Weights that are not negative and sum to one; all zero if no task is active.
    """
    size = len(towards)
    whole = jnp.eye(size + 1, dtype=matrix.dtype)
    whole = whole.at[:size, :size].set(matrix)
    whole = whole.at[size, :size].set(towards).at[:size, size].set(towards)
    allowed = jnp.append(active, fall > 0)
    zeros = jnp.zeros(size + 1, matrix.dtype)

    # A descent of at least `rate` on every task is a problem without the simplex. The
    # sum of its multipliers grows with the rate and is one at the steepest descent.
    def multipliers(rate, start):
        linear = jnp.append(jnp.full(size, -rate), -fall)
        return bounded_qp(whole, linear, zeros, allowed, start)[0]

    def halve(_, carry):
        low, high, below, above = carry
        rate = 0.5 * (low + high)
        x = multipliers(rate, below)
        enough = jnp.sum(x[:size]) >= 1.0
        return (
            jnp.where(enough, low, rate),
            jnp.where(enough, rate, high),
            jnp.where(enough, below, x),
            jnp.where(enough, x, above),
        )

    widest = 2.0 + fall
    carry = (-widest, widest, zeros, multipliers(widest, zeros))
    *_, below, above = jax.lax.fori_loop(0, _BISECTIONS, halve, carry)
    # Where no direction is steeper the multipliers jump, along a combination that
    # vanishes: the solution is on the way.
    below, above = below[:size], above[:size]
    jump = jnp.sum(above) - jnp.sum(below)
    part = (1.0 - jnp.sum(below)) / jnp.where(jump > 0, jump, 1.0)
    return shares(below + jnp.clip(part, 0.0, 1.0) * (above - below), active)
