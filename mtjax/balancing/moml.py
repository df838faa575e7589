"""MOML: multi-objective meta learning of loss weights."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import balancer
from mtjax.balancing.bilevel import for_optimizer, held_out_slopes, params_of
from mtjax.balancing.learnt import train_per_task
from mtjax.balancing.mgda import min_norm_weights
from mtjax.balancing.solvers import full_precision


class MOMLState(NamedTuple):
    """State of `moml`.

    Attributes:
      logits: `(tasks,)` float32, whose softmax are the loss weights.
      opt_state: state of their optimizer.
    """

    logits: Array
    opt_state: Any


def moml(
    num_tasks: int,
    *,
    inner_learning_rate: float = 0.1,
    inner_steps: int = 1,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns loss weights so that steps on them lower every held-out loss.

    Every held-out loss :math:`F_i(\theta_T(\alpha))`, after :math:`T` steps of SGD from
    :math:`\theta` on :math:`\sum_t \mathrm{softmax}(\alpha)_t L_t`, has a gradient by
    :math:`\alpha`. The weights move by the shortest vector in the convex hull of these
    gradients, as in `mgda`. The new weights scale the losses, on shared and on
    task-specific parameters alike.

    Args:
      num_tasks: number of tasks.
      inner_learning_rate: of SGD, positive.
      inner_steps: :math:`T`, at least 1. Every further step is one more evaluation of
        the losses and its gradient, differentiated for every task.
      optimizer: of :math:`\alpha`; Adam with learning rate 1e-3 if not given.

    Returns:
      A balancer with state. Needs `validation_losses_fn` and `params`, and `losses_fn`
      for more than one inner step. With one inner step it costs two backward passes,
      a forward pass per task, and a backward pass per task on held-out data.

    Raises:
      ValueError: if an argument is out of its range, or what is needed is not passed to
        the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = moml(2, optimizer=optax.sgd(1.0), inner_learning_rate=1.0)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, -1.0]])
      >>> held_out = lambda params: {"0": params[0], "1": params[0] + params[1]}
      >>> updates, state = tx.update(
      ...     grads, tx.init(None), jnp.zeros(2), validation_losses_fn=held_out
      ... )
      >>> print(state.logits)
      [ 0.25 -0.25]

    References:
      Multi-Objective Meta Learning, 2021, algorithm 1, on its multi-task problem. The
      derivatives are exact for any number of inner steps. MGDA sees the gradients as
      they are; the public code divides each by its norm first. An absent task counts
      neither in the batch nor on held-out data.
    """
    if inner_learning_rate <= 0:
        raise ValueError(
            f"`inner_learning_rate` must be positive, got {inner_learning_rate}."
        )
    if inner_steps < 1:
        raise ValueError(f"`inner_steps` must be at least 1, got {inner_steps}.")
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer

    def init(params):
        del params
        logits = jnp.zeros(num_tasks, jnp.float32)
        return MOMLState(logits, optimizer.init(logits))

    def update(grads, state, step):
        softmax = functools.partial(jax.nn.softmax, where=step.present)
        weights, pullback = jax.vjp(softmax, state.logits)
        rows = held_out_slopes(
            grads,
            step,
            params_of(step, "moml"),
            weights,
            jnp.eye(num_tasks, dtype=jnp.float32),
            inner_learning_rate,
            inner_steps,
        )
        slopes = common_descent(jax.vmap(lambda row: pullback(row)[0])(rows))
        moves = step.present & jnp.isfinite(slopes)
        new = MOMLState(
            *train_per_task(optimizer, slopes, state.logits, state.opt_state, moves)
        )
        return grads.scale(softmax(new.logits)).combine(), new

    needs = ("validation_losses_fn", "losses_fn")[: 1 + (inner_steps > 1)]
    return balancer("moml", init, update, num_tasks=num_tasks, needs=needs)


@full_precision
def common_descent(
    rows: Float[Array, "tasks weights"],
) -> Float[Array, " weights"]:
    """The shortest vector in the convex hull of the rows, as a slope to train by.

    Args:
      rows: gradients of the held-out losses.

    Returns:
      The vector; zero where it is not longer than rounding errors make it.
    """
    # In units of the largest entry, so that no square overflows.
    top = jnp.max(jnp.abs(rows))
    unit = jnp.where(top > 0, top, 1.0)
    gramian = (rows / unit) @ (rows / unit).T
    weights, _ = min_norm_weights(gramian)
    found = weights @ (rows / unit)
    squares = jnp.diagonal(gramian)
    shortest = jnp.min(jnp.where(squares > 0, squares, jnp.inf))
    # A Gramian tells squared lengths apart down to float32's precision.
    rounded = found @ found <= 1e-6 * shortest
    return for_optimizer(jnp.where(rounded, 0.0, unit * found))
