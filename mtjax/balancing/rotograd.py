"""RotoGrad: gradient homogenization, its balance of magnitudes."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, keep_absent, masked_gramian


class RotoGradState(NamedTuple):
    """State of `rotograd`.

    Attributes:
      steps: `(tasks,)` int32, steps in which the task had a gradient.
      first_norms: `(tasks,)` float32, gradient norms that later ones are compared with.
    """

    steps: Array
    first_norms: Array


def rotograd(
    num_tasks: int, *, burn_in_steps: int = 20
) -> optax.GradientTransformationExtraArgs:
    r"""Makes all gradients as long as a mean that the least converged tasks dominate.

    :math:`d = C \sum_t g_t / \|g_t\|` with :math:`C = \sum_t \alpha_t \|g_t\|`, where
    :math:`\alpha_t` are the ratios :math:`\|g_t\| / \|g_t^0\|` to the first norms,
    divided by their sum.

    This is one half of RotoGrad. The other, which turns the gradients towards each
    other, is `mtjax.rotated`: each task sees the representation through a rotation.

        pair = mtjax.rotated(encode, losses_from_representation)
        grad_fn = mtjax.value_and_task_grads(pair)
        params = {"model": params, "rotations": mtjax.init_rotations(tasks, size)}
        optimizers = {"model": optax.adam(1e-3), "rotations": optax.adam(1e-4)}
        slower = optax.partition(optimizers, {key: key for key in optimizers})
        tx = optax.chain(mtjax.rotograd(len(tasks)), slower)

    Args:
      num_tasks: number of tasks.
      burn_in_steps: number of steps after which the first norms are taken again, since
        those of the very first steps say little; 0 keeps them.

    Returns:
      A balancer with state, on whatever gradients it is given: for the paper's norms,
      those at the representation, use it with a pair as above.

    Raises:
      ValueError: if `burn_in_steps` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = rotograd(2)
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [2. 2.]

    References:
      RotoGrad: Gradient Homogenization in Multitask Learning, 2022, equation 6 and its
      public code, which takes the first norms again after the burn-in.
    """
    if burn_in_steps < 0:
        raise ValueError(f"`burn_in_steps` must not be negative, got {burn_in_steps}.")

    def init(params):
        del params
        return RotoGradState(
            jnp.zeros(num_tasks, jnp.int32), jnp.zeros(num_tasks, jnp.float32)
        )

    def update(grads, state, step):
        squares = jnp.diagonal(masked_gramian(grads, step))
        active = squares > 0
        norms = jnp.sqrt(jnp.where(active, squares, 1.0))
        starts = active & ((state.steps == 0) | (state.steps == burn_in_steps))
        first = keep_absent(norms, state.first_norms, starts & jnp.isfinite(norms))
        ratios = jnp.where(active, norms / jnp.where(first > 0, first, 1.0), 0.0)
        total = jnp.sum(ratios)
        length = jnp.sum(ratios / jnp.where(total > 0, total, 1.0) * norms)
        weights = jnp.where(active, length / norms, 0.0)
        return grads.combine(weights), RotoGradState(state.steps + active, first)

    return balancer("rotograd", init, update, num_tasks=num_tasks)
