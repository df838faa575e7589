"""MoCo: multi-objective gradient correction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, masked_gramian
from mtjax.balancing.simplex import project, redistribute, shares
from mtjax.balancing.solvers import full_precision
from mtjax.gradients import TaskGradients


class MoCoState(NamedTuple):
    """State of `moco`.

    Attributes:
      step: `()` int32, steps taken.
      weights: `(tasks,)` float32, on the simplex.
      tracked: params-shaped float32, leaves of shape `(tasks, *leaf.shape)`: the
        tracked gradients, zero on task-specific leaves.
    """

    step: Array
    weights: Array
    tracked: Any


def moco(
    num_tasks: int,
    *,
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Balances moving averages of the gradients, which are less noisy than a batch's.

    In step :math:`k`, :math:`y_t \leftarrow y_t - \beta_k (y_t - g_t)`, then
    :math:`\lambda \leftarrow \Pi_\Delta(\lambda - \gamma_k (Y Y^\top + \rho I)
    \lambda)` and :math:`d = \sum_t \lambda_t y_t`, with
    :math:`\beta_k = \beta k^{-\sigma_\beta}` and
    :math:`\gamma_k = \gamma k^{-\sigma_\gamma}`: one projected step per batch towards
    the weights of `mgda`.

    Args:
      num_tasks: number of tasks.
      beta: :math:`\beta`, in (0, 1]; 1 with `beta_sigma=0` tracks the batch itself.
      beta_sigma: :math:`\sigma_\beta`, not negative.
      gamma: :math:`\gamma`, positive. It multiplies squared gradients: the longer they
        are, the smaller it must be.
      gamma_sigma: :math:`\sigma_\gamma`, not negative.
      rho: :math:`\rho`, not negative; draws the weights together.

    Returns:
      A balancer with state, which holds a float32 gradient of every task: as much
      memory as the tasks' gradients take. Task-specific parameters follow the batch's
      own gradients.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = moco(2, beta=1.0)
      >>> grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(tx.update(grads, tx.init(grads[0]))[0])
      [0.85  0.575]

    References:
      Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent
      Approach, 2023, algorithm 1, with the defaults of its public code. That code
      divides each gradient by its norm and multiplies it by its loss first (put
      `normalize_per_task` before `moco` for the former), and takes a softmax where the
      paper, followed here, projects. An absent task keeps its tracked gradient and its
      weight; the others share the rest.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"`beta` must be in (0, 1], got {beta}.")
    if gamma <= 0:
        raise ValueError(f"`gamma` must be positive, got {gamma}.")
    bounds = {"beta_sigma": beta_sigma, "gamma_sigma": gamma_sigma, "rho": rho}
    for name, value in bounds.items():
        if value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")

    def init(params):
        return MoCoState(
            step=jnp.zeros((), jnp.int32),
            weights=jnp.full(num_tasks, 1.0 / num_tasks, jnp.float32),
            tracked=jax.tree.map(
                lambda p: jnp.zeros((num_tasks, *jnp.shape(p)), jnp.float32), params
            ),
        )

    @full_precision
    def update(grads, state, step):
        count = state.step + 1
        rows = grads.stack()
        rate = beta / count**beta_sigma
        moved = jax.tree.map(
            lambda shared, y, g: y - rate * (y - g) if shared else y,
            grads.shared,
            state.tracked,
            rows,
        )
        balanced = TaskGradients.from_stacked(
            jax.tree.map(
                lambda shared, y, g: y if shared else g, grads.shared, moved, rows
            ),
            split=grads.split,
        )
        gramian = masked_gramian(balanced, step)
        now = shares(state.weights, step.present)
        slope = jnp.matmul(gramian, now, precision="highest") + rho * now
        new = project(now - gamma / count**gamma_sigma * slope, step.present)
        updates = jax.tree.map(
            lambda d, g: d.astype(g.dtype), balanced.combine(new), rows
        )
        finite = step.present & jnp.isfinite(jnp.diagonal(gramian))
        tracked = jax.tree.map(
            lambda y, old: jnp.where(finite.reshape(-1, *[1] * (y.ndim - 1)), y, old),
            moved,
            state.tracked,
        )
        weights = redistribute(state.weights, new, step.present)
        return updates, MoCoState(count, weights, tracked)

    return balancer("moco", init, update, num_tasks=num_tasks)
