"""Inner products between the task gradients of two batches."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtjax.gradients import TaskGradients
from mtjax.gradients.stacked import unroll_pullbacks


def cross_product(
    left: TaskGradients, right: TaskGradients, weights: Float[Array, " tasks"]
) -> Float[Array, " tasks"]:
    r"""The product :math:`G_1 G_2^\top w` on the shared parameters.

    Costs one backward and one forward pass, whatever the number of tasks.

    Args:
      left: the gradients :math:`G_1`.
      right: the gradients :math:`G_2`, at the same parameters.
      weights: the weights :math:`w`.

    Returns:
      Inner products of each task's gradient in `left` with the weighted sum of those in
      `right`, float32.
    """
    direction = jax.tree.map(
        lambda shared, d: d if shared else jnp.zeros_like(d),
        right.shared,
        right.combine(weights),
    )
    return left.inner(direction)


def cross_gramian(
    left: TaskGradients, right: TaskGradients
) -> Float[Array, "tasks tasks"]:
    r"""The matrix :math:`G_1 G_2^\top` on the shared parameters.

    Costs one backward and one forward pass per task, and the memory of one gradient
    where they are unrolled.

    Args:
      left: the gradients whose tasks are the rows.
      right: the gradients whose tasks are the columns, at the same parameters.

    Returns:
      The inner products, float32; not symmetric if the batches differ.
    """
    basis = jnp.eye(len(right.tasks), dtype=jnp.float32)
    column = lambda weights: cross_product(left, right, weights)
    if unroll_pullbacks(len(basis)):
        return jnp.stack([column(weights) for weights in basis], axis=1)
    return jax.vmap(column, out_axes=1)(basis)
