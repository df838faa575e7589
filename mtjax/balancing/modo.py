"""MoDo: multi-objective gradient with double sampling."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer
from mtjax.balancing.cross import cross_product
from mtjax.balancing.simplex import project, redistribute, shares


class MoDoState(NamedTuple):
    """State of `modo`.

    Attributes:
      weights: `(tasks,)` float32, on the simplex.
    """

    weights: Array


def modo(
    num_tasks: int, *, gamma: float = 1e-3, rho: float = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""Moves weights towards MGDA's by an unbiased slope from two independent batches.

    With the gradients :math:`G_1, G_2` of two further batches,
    :math:`\lambda \leftarrow \Pi_\Delta(\lambda - \gamma (G_1 G_2^\top \lambda +
    \rho \lambda))`, then :math:`d = \sum_t \lambda_t g_t` with the gradients of this
    batch. A product of one batch's gradients with themselves would be biased by their
    variance.

    Args:
      num_tasks: number of tasks.
      gamma: :math:`\gamma`, positive. It multiplies squared gradients: the longer they
        are, the smaller it must be.
      rho: :math:`\rho`, not negative; draws the weights together.

    Returns:
      A balancer with state. Needs `resampled`: two further batches, or one, in whose
      pair this batch is then the second. Costs two backward passes and one forward
      pass whatever the number of tasks, and the losses of the further batches. The
      weights apply to shared parameters; task-specific ones follow this batch's own
      gradients.

    Raises:
      ValueError: if an argument is out of its range, or `resampled` is not passed to
        the update.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> tx = modo(2, gamma=0.1, rho=0.0)
      >>> grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> again = [mtjax.TaskGradients.from_stacked(grads)] * 2
      >>> print(tx.update(grads, tx.init(None), resampled=again)[0])
      [0.85  0.575]

    References:
      Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
      Conflict-Avoidance, 2023, algorithm 1, with three batches. Its public code takes
      two, of which both move the parameters; here only this one does. The term with
      :math:`\rho` and both defaults are those of the public code. An absent task keeps
      its weight; the others share the rest.
    """
    if gamma <= 0:
        raise ValueError(f"`gamma` must be positive, got {gamma}.")
    if rho < 0:
        raise ValueError(f"`rho` must not be negative, got {rho}.")

    def init(params):
        del params
        return MoDoState(jnp.full(num_tasks, 1.0 / num_tasks, jnp.float32))

    def update(grads, state, step):
        first, second = (*step.resampled[:2], grads)[:2]
        now = shares(state.weights, step.present)
        slope = cross_product(first, second, now) + rho * now
        new = project(now - gamma * slope, step.present)
        weights = redistribute(state.weights, new, step.present)
        return grads.combine(new), MoDoState(weights)

    return balancer("modo", init, update, num_tasks=num_tasks, needs=("resampled",))
