"""GradNorm: gradient normalisation."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, masked_gramian, mean_over_present
from mtjax.balancing.learnt import train_per_task
from mtjax.balancing.scalarisation import check_eps, usable_losses

# A weight that an overshooting step would make negative, relative to their mean.
_SMALLEST = 1e-3


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      weights: `(tasks,)` float32.
      opt_state: state of the weights' optimizer.
      sums: `(tasks,)` float32, losses summed over each task's first steps.
      counts: `(tasks,)` float32, how many.
    """

    weights: Array
    opt_state: Any
    sums: Array
    counts: Array


def gradnorm(
    num_tasks: int,
    *,
    alpha: float = 1.5,
    optimizer: optax.GradientTransformation | None = None,
    initial_steps: int = 1,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns weights that make all tasks train at similar rates.

    With :math:`G_t = \|w_t g_t\|` and the relative inverse training rates
    :math:`r_t = \tilde L_t / \mathrm{mean}(\tilde L)`,
    :math:`\tilde L_t = L_t / L_t(0)`, the weights move against the gradient of
    :math:`\sum_t |G_t - \bar G r_t^\alpha|`, the target held constant, and are
    multiplied so that they sum to the number of tasks. They apply to shared and to
    task-specific parameters alike.

    Args:
      num_tasks: number of tasks.
      alpha: :math:`\alpha \ge 0`; with 0 all gradients get the same norm, a larger one
        favours tasks that lag behind more.
      optimizer: trains the weights; `optax.adam(0.025)` if not given.
      initial_steps: :math:`L_t(0)` is the mean of a task's losses over its first so
        many steps; the running mean until then.
      eps: smallest loss that is told apart, positive. A loss at or below it, negative
        ones included, counts as `eps`.

    Returns:
      A balancer with state. It asks the Gramian for its diagonal alone; with the engine
      "representation" the norms are those of the shared representation. Needs `losses`.

    Raises:
      ValueError: if an argument is out of its range, or `losses` are not passed to the
        update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = gradnorm(2, alpha=0.0, optimizer=optax.sgd(0.1))
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> _, state = tx.update(grads, tx.init(None), losses=jnp.ones(2))
      >>> with jnp.printoptions(precision=3):
      ...     print(state.weights)
      [1.222 0.778]

    References:
      GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
      Networks, 2018, equations 1 and 2. The paper takes the norms on the last shared
      layer. Weights below a thousandth count as that; a task whose gradient is zero
      keeps its weight.
    """
    if alpha < 0:
        raise ValueError(f"`alpha` must not be negative, got {alpha}.")
    if initial_steps < 1:
        raise ValueError(f"`initial_steps` must be at least 1, got {initial_steps}.")
    check_eps(eps)
    optimizer = optax.adam(0.025) if optimizer is None else optimizer

    def init(params):
        del params
        weights = jnp.ones(num_tasks, jnp.float32)
        zeros = lambda: jnp.zeros(num_tasks, jnp.float32)
        return GradNormState(weights, optimizer.init(weights), zeros(), zeros())

    def update(grads, state, step):
        norms = jnp.sqrt(jnp.diagonal(masked_gramian(grads, step)))
        losses = usable_losses(step.losses, step.present, eps)
        known = step.present & jnp.isfinite(losses) & jnp.isfinite(norms)
        measured = known & (state.counts < initial_steps)
        sums = state.sums + jnp.where(measured, losses, 0.0)
        counts = state.counts + measured

        progress = jnp.where(known, losses, 1.0) * counts / jnp.where(known, sums, 1.0)
        rates = progress / jnp.maximum(mean_over_present(progress, known), eps)
        weighted = state.weights * norms
        target = mean_over_present(weighted, known) * rates**alpha
        moves = known & (norms > 0)
        slopes = norms * jnp.sign(weighted - target)
        moved, opt_state = train_per_task(
            optimizer, slopes, state.weights, state.opt_state, moves
        )
        # Absent tasks keep their weights, so the others keep their sum.
        moved = jnp.where(moves, jnp.maximum(moved, _SMALLEST), moved)
        total = lambda weights: jnp.sum(jnp.where(moves, weights, 0.0))
        factor = total(state.weights) / jnp.maximum(total(moved), _SMALLEST)
        weights = jnp.where(moves, factor * moved, state.weights)
        updates = grads.scale(state.weights).combine()
        return updates, GradNormState(weights, opt_state, sums, counts)

    return balancer("gradnorm", init, update, num_tasks=num_tasks, needs=("losses",))
