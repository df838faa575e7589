"""Weights by the norms of the gradients, as for physics-informed networks."""

import jax.numpy as jnp
import optax

from mtjax.balancing.balancer import masked_gramian
from mtjax.balancing.inverse_shares import inverse_shares


def grad_norm_weights(
    num_tasks: int, *, momentum: float = 0.9, update_every: int = 1000
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the norms of all weighted gradients the same, slowly.

    Every so many steps
    :math:`w_t \leftarrow \alpha w_t + (1 - \alpha) \sum_s \|g_s\| / \|g_t\|`, from
    weights of one. At fixed gradients each weighted gradient gets the norm
    :math:`\sum_s \|g_s\|`. The weights apply to shared and to task-specific parameters
    alike.

    Args:
      num_tasks: number of tasks.
      momentum: :math:`\alpha \in [0, 1)`.
      update_every: the weights move in the first step and every so many steps.

    Returns:
      A balancer with state. In the steps in between it costs one backward pass; in
      those in which the weights move, it asks the Gramian for its diagonal alone. (On
      a CPU, XLA runs convolutions in such a conditional step some hundred times slower;
      a small `update_every` other than 1 is not for them.) A task whose gradient is
      zero keeps its weight.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = grad_norm_weights(2, momentum=0.0)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> print(tx.update(grads, tx.init(None))[0])
      [4. 4.]

    References:
      An Expert's Guide to Training Physics-informed Neural Networks, 2023, algorithm 1.
      The norms are those on the shared parameters, which in such networks are all.
    """

    def norms(grads, step):
        return jnp.sqrt(jnp.diagonal(masked_gramian(grads, step)))

    return inverse_shares(
        "grad_norm_weights",
        num_tasks,
        norms,
        momentum=momentum,
        update_every=update_every,
    )
