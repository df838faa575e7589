"""Weights by the traces of the tasks' neural tangent kernels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.inverse_shares import inverse_shares

PyTree = Any


def ntk_weights(
    num_tasks: int,
    traces_fn: Callable[[PyTree], Float[Array, " tasks"]],
    *,
    momentum: float = 0.9,
    update_every: int = 1000,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes all residuals decay at the same mean rate under gradient flow.

    Every so many steps :math:`w_t \leftarrow \alpha w_t + (1 - \alpha)
    \sum_s \mathrm{tr} K_s / \mathrm{tr} K_t`, from weights of one, where
    :math:`K_t = J_t J_t^\top` is the tangent kernel of the task's residuals. The trace
    is the sum of the eigenvalues, which are the rates at which the residuals of a
    squared loss decay. The weights apply to shared and to task-specific parameters
    alike.

    Args:
      num_tasks: number of tasks.
      traces_fn: the traces at given parameters, in the order of the sorted task names.
        Gradients of losses do not determine them; `ntk_traces` computes them exactly
        from the residuals, on points that the function holds.
      momentum: :math:`\alpha \in [0, 1)`; the paper averages nothing, which is 0.
      update_every: the weights move in the first step and every so many steps.

    Returns:
      A balancer with state, of the cost of one backward pass, and of `traces_fn` in the
      steps in which the weights move. Needs `params`. A task whose trace is zero keeps
      its weight.

    Raises:
      ValueError: if an argument is out of its range, `params` are not passed to the
        update, or the traces are not one per task.

    Example:
      >>> import jax.numpy as jnp
      >>> def residuals(params):
      ...     return {"boundary": params - 1.0, "interior": 3.0 * params}
      >>> tx = ntk_weights(2, lambda p: ntk_traces(residuals, p), momentum=0.0)
      >>> params, grads = jnp.zeros(1), jnp.array([[1.0], [1.0]])
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> with jnp.printoptions(precision=3):
      ...     print(state.weights)
      [10.     1.111]

    References:
      When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective, 2022,
      algorithm 1. The moving average and how often it moves are those of An Expert's
      Guide to Training Physics-informed Neural Networks, 2023.
    """

    def measure(grads, step):
        if step.params is None:
            raise ValueError("`ntk_weights` needs `params` in the update.")
        traces = jnp.asarray(traces_fn(step.params), jnp.float32)
        if traces.shape != (num_tasks,):
            raise ValueError(
                f"`traces_fn` must return one trace for each of the tasks "
                f"{grads.tasks}, got shape {traces.shape}."
            )
        return traces

    return inverse_shares(
        "ntk_weights",
        num_tasks,
        measure,
        momentum=momentum,
        update_every=update_every,
    )


def ntk_traces(
    outputs_fn: Callable[[PyTree], Mapping[str, Array]],
    params: PyTree,
    *,
    batch_size: int = 32,
) -> Float[Array, " tasks"]:
    r"""Traces of the tangent kernels: sums of the squared entries of the Jacobians.

    :math:`\mathrm{tr}\, J_t J_t^\top = \sum_i \|\nabla_\theta r_{t,i}\|^2`, exactly, by
    one backward pass per residual.

    Args:
      outputs_fn: each task's residuals at given parameters, arrays of any shape.
      params: where to take the derivatives, all of them.
      batch_size: how many backward passes run at once, each with the memory of one
        gradient.

    Returns:
      One trace per task, in the order of the sorted names.

    Raises:
      ValueError: if `batch_size` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> def outputs(params):
      ...     return {"a": jnp.outer(jnp.arange(3.0), params), "b": params[0] ** 2}
      >>> print(ntk_traces(outputs, jnp.array([2.0, 1.0])))
      [10. 16.]
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")

    def trace(task):
        outputs, pull = jax.vjp(lambda p: outputs_fn(p)[task].ravel(), params)

        def square(i):
            (gradient,) = pull(jnp.zeros_like(outputs).at[i].set(1))
            return sum(
                jnp.sum(g.astype(jnp.float32) ** 2) for g in jax.tree.leaves(gradient)
            )

        places = jnp.arange(len(outputs))
        return jnp.sum(jax.lax.map(square, places, batch_size=batch_size))

    tasks = sorted(jax.eval_shape(outputs_fn, params))
    return jnp.stack([trace(task) for task in tasks])
