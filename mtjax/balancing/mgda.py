"""MGDA: the multiple-gradient descent algorithm."""

from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import balancer, check_choice, masked_gramian
from mtjax.balancing.solvers import Info, in_units, shortest_in_hull


def mgda(
    *, normalize: Literal["none", "l2", "loss", "loss+l2"] = "none"
) -> optax.GradientTransformationExtraArgs:
    r"""Steps along the shortest vector in the convex hull of the gradients.

    :math:`\alpha = \arg\min_{\alpha \in \Delta} \|\sum_t \alpha_t g_t\|^2`,
    :math:`d = \sum_t \alpha_t g_t`. Then :math:`\langle d, g_t \rangle \ge \|d\|^2` for
    all tasks, and :math:`d = 0` exactly at Pareto-stationary points.

    A task whose gradient is zero counts as absent: it asks for nothing, whereas by the
    formula it would stop all others.

    Args:
      normalize: what gradients are divided by before weights are found: "none", their
        norm ("l2"), their loss ("loss"), or both ("loss+l2"). The weights found are
        applied to the gradients themselves.

    Returns:
      A balancer without state. Needs `losses` if it normalises by them.

    Raises:
      ValueError: if `normalize` is unknown, or needed `losses` are not passed to the
        update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = mgda()
      >>> print(tx.update(jnp.array([[2.0, 0.0], [0.0, 1.0]]), tx.init(None))[0])
      [0.4 0.8]

    References:
      Multi-Task Learning as Multi-Objective Optimization, 2018, problem 3 (solved
      exactly by an active-set method, not by Frank-Wolfe steps). Use an
      `(encode, losses_from_representation)` pair in `mtjax.value_and_task_grads` for
      its MGDA-UB.
    """
    check_choice("normalize", normalize, ("none", "l2", "loss", "loss+l2"))

    def update(grads, state, step):
        gramian = masked_gramian(grads, step)
        scale = jnp.ones(len(grads.tasks), jnp.float32)
        if "loss" in normalize:
            scale = jnp.where(step.losses > 0, step.losses, 1.0)
        if "l2" in normalize:
            squares = jnp.diagonal(gramian)
            scale = scale * jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        weights, _ = min_norm_weights(gramian / scale[:, None] / scale[None, :])
        return grads.combine(weights), state

    needs = ("losses",) if "loss" in normalize else ()
    return balancer("mgda", lambda params: optax.EmptyState(), update, needs=needs)


def min_norm_weights(
    gramian: Float[Array, "tasks tasks"],
) -> tuple[Float[Array, " tasks"], Info]:
    """Weights of the shortest vector in the convex hull of the gradients.

    Args:
      gramian: inner products of the tasks' gradients.

    Returns:
      Weights that are not negative and sum to one, zero on zero gradients; all zero if
      every gradient is. And how well they solve the problem.
    """
    return shortest_in_hull(*in_units(gramian))
