"""GradVac: gradient vaccine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import balancer, default_key, masked_gramian
from mtjax.balancing.cosines import cosines
from mtjax.balancing.pcgrad import random_orders
from mtjax.balancing.solvers import full_precision

# Targets stay this far from -1 and 1, where the rotation to them has no bound and the
# rounding of a cosine would decide whether there is one.
_MARGIN = 1e-4


class GradVacState(NamedTuple):
    """State of `gradvac`.

    Attributes:
      key: `()` random key of the next step's orders.
      rho_bar: `(tasks, tasks)` float32, moving averages of the cosines; row i holds
        those of task i's gradient, as far as it was rotated, with the others.
    """

    key: Array
    rho_bar: Array


def gradvac(
    num_tasks: int, *, beta: float = 1e-2, key: Array | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Rotates gradients towards each other until their usual cosines are met.

    For each task :math:`i`, starting from :math:`g'_i = g_i`, and for the other tasks
    :math:`j` in random order: with :math:`\rho` the cosine of :math:`g'_i` and
    :math:`g_j`, if :math:`\rho < \bar\rho_{ij}`,

    .. math:: g'_i \leftarrow g'_i + \frac{\|g'_i\| (\bar\rho_{ij} \sqrt{1 - \rho^2}
              - \rho \sqrt{1 - \bar\rho_{ij}^2})}{\|g_j\| \sqrt{1 - \bar\rho_{ij}^2}}
              \, g_j,

    after which the cosine is :math:`\bar\rho_{ij}`; then
    :math:`\bar\rho_{ij} \leftarrow (1 - \beta) \bar\rho_{ij} + \beta \rho`. The
    direction is :math:`\sum_i g'_i`. All of it happens on the Gramian.

    Args:
      num_tasks: number of tasks.
      beta: rate of the moving averages in [0, 1]; they start at zero, so that 0 gives
        `pcgrad`.
      key: random key of the orders, `jax.random.key(0)` if not given. A `key` that is
        passed to the update takes its place in that step.

    Returns:
      A balancer with state. Averages of absent tasks and of zero gradients stay.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = gradvac(2)
      >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [0.5 1.5]

    References:
      Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
      Multilingual Models, 2021, equation 5 and algorithm 1. The cosines are those of
      all shared parameters (the paper's granularity "whole model"). For one set of
      averages per group of parameters, as where it works layer by layer, put one
      `gradvac` per group into `optax.partition`, on gradients stacked over the tasks.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta` must be in [0, 1], got {beta}.")
    start = default_key(key)

    def init(params):
        del params
        rho_bar = jnp.zeros((num_tasks, num_tasks), jnp.float32)
        return GradVacState(jnp.copy(start), rho_bar)

    def update(grads, state, step):
        next_key, step_key = jax.random.split(state.key)
        if step.key is not None:
            step_key = step.key
        gramian = masked_gramian(grads, step)
        weights, rho = vaccinated_weights(gramian, state.rho_bar, key=step_key)
        rho_bar = state.rho_bar + beta * (rho - state.rho_bar)
        rho_bar = jnp.where(jnp.isfinite(rho_bar), rho_bar, state.rho_bar)
        return grads.combine(weights.sum(0)), GradVacState(next_key, rho_bar)

    return balancer("gradvac", init, update, num_tasks=num_tasks)


@full_precision
def vaccinated_weights(
    gramian: Float[Array, "tasks tasks"],
    rho_bar: Float[Array, "tasks tasks"],
    *,
    key: Array,
) -> tuple[Float[Array, "tasks tasks"], Float[Array, "tasks tasks"]]:
    """The rotated gradients, each as weights of the original ones.

    Args:
      gramian: inner products of the tasks' gradients.
      rho_bar: the cosines to be met.
      key: random key of the orders.

    Returns:
      Row i holds the weights that make the rotated gradient of task i; and the cosines
      that were found before each rotation, `rho_bar` where there is none.
    """
    matrix, norms, active = cosines(gramian)
    num_tasks = len(norms)
    tasks = jnp.arange(num_tasks)
    targets = jnp.clip(rho_bar, _MARGIN - 1.0, 1.0 - _MARGIN)
    orders = random_orders(num_tasks, key=key)

    def rotate(carry, others):
        # Weights of unit gradients, in units of the row's own gradient.
        weights, found = carry
        pairs = active & active[others] & (others != tasks)
        square = jnp.sum(weights * (weights @ matrix), axis=1)
        length = jnp.sqrt(jnp.maximum(square, 0.0))
        product = jnp.sum(weights * matrix[others], axis=1)
        rho = product / jnp.where(length > 0, length, 1.0)
        rho = jnp.clip(rho, -1.0, 1.0)
        target = targets[tasks, others]
        tangents = jnp.sqrt(1.0 - rho**2) / jnp.sqrt(1.0 - target**2)
        added = jnp.where(pairs & (rho < target), target * tangents - rho, 0.0)
        weights = weights.at[tasks, others].add(length * added)
        known = jnp.where(pairs, rho, found[tasks, others])
        return (weights, found.at[tasks, others].set(known)), None

    eye = jnp.eye(num_tasks, dtype=gramian.dtype)
    (weights, found), _ = jax.lax.scan(rotate, (eye, rho_bar), orders.T)
    return weights * norms[:, None] / norms[None, :], found
