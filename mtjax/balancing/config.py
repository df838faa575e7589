"""ConFIG: conflict-free inverse gradients."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from mtjax.balancing.balancer import check_preference, gramian_balancer
from mtjax.balancing.cosines import cosines
from mtjax.balancing.solvers import RIDGE, full_precision


def config(
    *, preference: ArrayLike | Sequence[float | int] | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Has the same cosine with all gradients, and the length of their projections.

    With the unit gradients as rows of :math:`U`, the direction is
    :math:`v = U^+ p / \|U^+ p\|`, :math:`p` all ones or the preference, and
    :math:`d = \sum_t \langle g_t, v \rangle v`. Its cosines with the gradients are in
    the proportions of :math:`p`, so it conflicts with none that are independent.

    Args:
      preference: :math:`p`, one per task, none negative; equal if not given.

    Returns:
      A balancer without state. Tasks whose gradients are zero count as absent.

    Raises:
      ValueError: if `preference` is not one finite entry per task, none negative and
        not all zero.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = config()
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [2. 2.]

    References:
      ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, 2024,
      equations 2 and 3. The pseudo-inverse is that of the cosines,
      :math:`U^+ p = U^\top (U U^\top)^+ p`; eigenvalues below the rounding of float32
      count as zero.
    """
    if preference is not None:
        check_preference(preference)

    def weigh(gramian, step):
        wanted = jnp.ones(len(gramian), jnp.float32)
        if preference is not None:
            wanted = jnp.asarray(check_preference(preference, len(gramian)))
        return conflict_free_weights(gramian, wanted)

    return gramian_balancer("config", weigh)


@full_precision
def conflict_free_weights(
    gramian: Float[Array, "tasks tasks"], preference: Float[Array, " tasks"]
) -> Float[Array, " tasks"]:
    """Weights of the direction of preferred cosines.

    Args:
      gramian: inner products of the tasks' gradients.
      preference: what the cosines are to be proportional to.

    Returns:
      Weights of any sign, zero on zero gradients.
    """
    matrix, norms, active = cosines(gramian)
    wanted = jnp.where(active, preference, 0.0)
    values, vectors = jnp.linalg.eigh(matrix)
    kept = values > RIDGE * len(norms)
    inverse = jnp.where(kept, 1.0 / jnp.where(kept, values, 1.0), 0.0)
    unit_weights = vectors @ (inverse * (wanted @ vectors))
    square = unit_weights @ matrix @ unit_weights
    unit_weights = unit_weights / jnp.sqrt(jnp.where(square > 0, square, 1.0))
    # In units of the largest gradient, so that nothing overflows.
    longest = jnp.max(jnp.where(active, norms, 0.0))
    relative = jnp.where(active, norms / jnp.where(longest > 0, longest, 1.0), 0.0)
    length = relative @ matrix @ unit_weights
    return jnp.where(active, length * unit_weights * (longest / norms), 0.0)
