"""SGD steps ahead on weighted losses, for weights that are learnt on held-out data."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import Step, loss_vector
from mtjax.gradients import TaskGradients
from mtjax.gradients.stacked import unroll_pullbacks

PyTree = Any


def params_of(step: Step, name: str) -> PyTree:
    """The parameters.

    Args:
      step: what is known about the step.
      name: the balancer that needs them.

    Returns:
      The parameters.

    Raises:
      ValueError: if they were not passed to the update.
    """
    if step.params is None:
        raise ValueError(
            f"`{name}` needs `params`, got None; call `tx.update(grads, state, params, "
            "...)`."
        )
    return step.params


def look_ahead(
    grads: TaskGradients,
    step: Step,
    params: PyTree,
    weights: Float[Array, " tasks"],
    learning_rate: float,
    num_steps: int = 1,
) -> PyTree:
    """The parameters after SGD steps on the weighted losses of this batch.

    Args:
      grads: gradients at `params`, which the first step takes.
      step: `losses_fn` for the further steps.
      params: where the steps begin.
      weights: of the losses; those of absent tasks do not count.
      learning_rate: of SGD.
      num_steps: at least 1.

    Returns:
      Params-shaped.
    """
    first = _moved(params, grads.scale(weights).combine(), learning_rate)
    return _go_on(grads, step, first, weights, learning_rate, num_steps - 1)


def held_out_losses(
    step: Step, params: PyTree, tasks: tuple[str, ...]
) -> Float[Array, " tasks"]:
    """The losses on held-out data, zero for absent tasks."""
    losses_fn: Any = step.validation_losses_fn
    losses = loss_vector(losses_fn(params), tasks)
    return jnp.where(step.present, losses, 0.0)


def held_out_slopes(
    grads: TaskGradients,
    step: Step,
    params: PyTree,
    weights: Float[Array, " tasks"],
    directions: Float[Array, "rows tasks"],
    learning_rate: float,
    num_steps: int = 1,
) -> Float[Array, "rows tasks"]:
    r"""Exact derivatives of held-out losses after `look_ahead` by the weights.

    After one step :math:`\theta' = \theta - \alpha \sum_t w_t g_t` they are
    :math:`\partial L / \partial w_t = -\alpha \langle g_t, \nabla L(\theta') \rangle`,
    which needs no second derivative.

    Args:
      grads: gradients at `params`.
      step: the losses on held-out data, and those on this batch for further steps.
      params: where the steps begin.
      weights: of the losses.
      directions: each row weighs the held-out losses of one sum to differentiate.
      learning_rate: of SGD.
      num_steps: at least 1; each further one is differentiated as well.

    Returns:
      One row for each of the `directions`, zero for absent tasks.
    """
    first = look_ahead(grads, step, params, weights, learning_rate)

    def losses_at_the_end(weights, params):
        ahead = _go_on(grads, step, params, weights, learning_rate, num_steps - 1)
        return held_out_losses(step, ahead, grads.tasks)

    _, pullback = jax.vjp(losses_at_the_end, weights, first)

    def row(direction):
        by_weights, by_params = pullback(direction)
        slopes = by_weights - learning_rate * grads.inner(by_params)
        return jnp.where(step.present, slopes, 0.0)

    if unroll_pullbacks(len(directions)):
        return jnp.stack([row(direction) for direction in directions])
    return jax.vmap(row)(directions)


def for_optimizer(
    slopes: Float[Array, " tasks"], unit: Float[Array, ""] | float = 0.0
) -> Float[Array, " tasks"]:
    """Slopes of the weights in the range in which an optimizer such as Adam is safe.

    Args:
      slopes: of any size.
      unit: the size of what they are differences of.

    Returns:
      The slopes, zero where only rounding errors are left, which Adam would take for a
      slope like any other, and so bounded that their squares do not overflow.
    """
    rounded = jnp.abs(slopes) <= 1e-6 * unit
    return jnp.clip(jnp.where(rounded, 0.0, slopes), -1e18, 1e18)


def _go_on(grads, step, params, weights, learning_rate, num_steps):
    def weighted(params):
        losses = loss_vector(step.losses_fn(params), grads.tasks)
        return jnp.sum(jnp.where(step.present, weights * losses, 0.0))

    # Unrolled: the CPU backend runs convolutions inside loops many times slower.
    for _ in range(num_steps):
        params = _moved(params, jax.grad(weighted)(params), learning_rate)
    return params


def _moved(params, slope, learning_rate):
    change = jax.tree.map(lambda g: -learning_rate * g, slope)
    return optax.apply_updates(params, change)
