"""SDMGrad: stochastic direction-oriented multi-objective gradient descent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtjax.balancing.balancer import balancer
from mtjax.balancing.cross import cross_gramian
from mtjax.balancing.simplex import project, redistribute, shares
from mtjax.balancing.solvers import full_precision


class SDMGradState(NamedTuple):
    """State of `sdmgrad`.

    Attributes:
      weights: `(tasks,)` float32, on the simplex.
    """

    weights: Array


def sdmgrad(
    num_tasks: int,
    *,
    regularization: float = 0.3,
    num_steps: int = 20,
    learning_rate: float = 5.0,
    momentum: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    r"""Finds a common descent direction near the mean gradient, from three batches.

    With the gradients :math:`G_1, G_2` of two further batches, divided by the mean of
    :math:`\sqrt{\langle g_{1,t}, g_{2,t} \rangle}`, it descends
    :math:`\tfrac12 w^\top G_1 G_2^\top w + \lambda w^\top G_1 \bar g_2` on the simplex
    by projected steps of SGD with momentum from the weights of the last update. Then
    :math:`d = (\sum_t w_t g_t + \lambda \bar g) / (1 + \lambda)` with the gradients of
    this batch and means :math:`\bar g`.

    Args:
      num_tasks: number of tasks.
      regularization: :math:`\lambda`, not negative; 0 aims at the direction of `mgda`,
        large values give the mean gradient.
      num_steps: number of projected steps, at least 1.
      learning_rate: of these steps, positive. The default jumps between corners of the
        simplex rather than converge; 0.1 with more steps converges.
      momentum: of these steps, in [0, 1).

    Returns:
      A balancer with state. Needs `resampled`, two further batches. Costs one backward
      and one forward pass per task, one backward pass for the update, and the losses of
      the further batches. The weights apply to shared parameters; task-specific ones
      follow this batch's own gradients.

    Raises:
      ValueError: if an argument is out of its range, or `resampled` is not passed to
        the update or holds fewer than two batches.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> tx = sdmgrad(2, regularization=1.0, num_steps=100, learning_rate=0.1)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> again = [mtjax.TaskGradients.from_stacked(grads)] * 2
      >>> print(tx.update(grads, tx.init(None), resampled=again)[0])
      [0.5 0.5]

    References:
      Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
      Algorithms, 2023, algorithm 1, with the scaling, momentum and defaults of its
      public code. Where no scale is positive the weights stay. The matrix is computed
      column by column, in the memory of one gradient instead of one per task.
    """
    if regularization < 0:
        raise ValueError(
            f"`regularization` must not be negative, got {regularization}."
        )
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    if learning_rate <= 0:
        raise ValueError(f"`learning_rate` must be positive, got {learning_rate}.")
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")

    def init(params):
        del params
        return SDMGradState(jnp.full(num_tasks, 1.0 / num_tasks, jnp.float32))

    @full_precision
    def descend(
        matrix: Float[Array, "tasks tasks"],
        start: Float[Array, " tasks"],
        present: Bool[Array, " tasks"],
    ) -> Float[Array, " tasks"]:
        linear = regularization * matrix @ shares(present.astype(jnp.float32), present)

        def move(_, carry):
            weights, velocity = carry
            velocity = momentum * velocity + matrix @ weights + linear
            return project(weights - learning_rate * velocity, present), velocity

        carry = (start, jnp.zeros_like(start))
        return jax.lax.fori_loop(0, num_steps, move, carry)[0]

    def update(grads, state, step):
        if len(step.resampled) < 2:
            raise ValueError(
                "`resampled` of `sdmgrad` must hold the gradients of two batches, got "
                f"{len(step.resampled)}; draw two batches beside the one of the step."
            )
        present = step.present
        matrix = cross_gramian(*step.resampled[:2])
        matrix = jnp.where(present[:, None] & present[None, :], matrix, 0.0)
        lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0.0))
        equal = shares(present.astype(jnp.float32), present)
        scale = jnp.sum(equal * lengths)
        unit = jnp.where(scale > 0, scale, 1.0)
        scaled = jnp.where(scale == 0, 0.0, matrix / unit / unit)
        new = descend(scaled, shares(state.weights, present), present)
        weights = redistribute(state.weights, new, present)
        mixed = (new + regularization * equal) / (1.0 + regularization)
        return grads.combine(mixed), SDMGradState(weights)

    return balancer("sdmgrad", init, update, num_tasks=num_tasks, needs=("resampled",))
