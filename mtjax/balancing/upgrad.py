"""UPGrad: projecting every gradient onto the dual cone, then averaging."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import check_preference, gramian_balancer
from mtjax.balancing.dualproj import project_on_dual_cone
from mtjax.balancing.solvers import Info


def upgrad(
    *, preference: Sequence[float] | None = None, reg_eps: float = 1e-4
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the projections of the gradients onto the directions that hurt no task.

    Each task's gradient is projected onto the cone
    :math:`\{d : \langle d, g_t \rangle \ge 0\ \forall t\}`; the direction is the mean
    of the projections. It conflicts with no task, for any number of tasks, and equals
    the mean gradient if no two gradients conflict.

    Args:
      preference: weight of each task's projection, not negative; one over the number of
        present tasks if not given.
      reg_eps: added to the diagonal of the Gramian divided by its trace. It bounds the
        weights; a task whose squared norm is below this fraction of the total may be
        hurt by as much.

    Returns:
      A balancer without state.

    Raises:
      ValueError: if `reg_eps` is not positive, or `preference` not one finite entry per
        task, none negative and not all zero.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = upgrad(reg_eps=1e-7)
      >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [0.25 0.75]

    References:
      Jacobian Descent for Multi-Objective Optimization, 2024, proposition 1 and
      equation 5.
    """
    if reg_eps <= 0:
        raise ValueError(f"`reg_eps` must be positive, got {reg_eps}.")
    if preference is not None:
        check_preference(preference)

    def weigh(gramian, step):
        if preference is None:
            wanted = step.present / jnp.maximum(jnp.sum(step.present), 1)
        else:
            given = check_preference(preference, len(gramian))
            wanted = jnp.where(step.present, given, 0.0)
        return projection_weights(gramian, wanted, reg_eps)[0]

    return gramian_balancer("upgrad", weigh)


def projection_weights(
    gramian: Float[Array, "tasks tasks"],
    preference: Float[Array, " tasks"],
    reg_eps: float,
) -> tuple[Float[Array, " tasks"], Info]:
    """Weights of the sum of the preferred gradients, each projected on the dual cone.

    Args:
      gramian: inner products of the tasks' gradients.
      preference: weight of each projection.
      reg_eps: relative regularisation, see `upgrad`.

    Returns:
      The weights, at least `preference`; how well the worst projection is solved, and
      the most iterations of one.
    """
    weights, info = jax.vmap(project_on_dual_cone, in_axes=(None, 0, None))(
        gramian, jnp.diag(preference), reg_eps
    )
    worst = Info(
        kkt_residual=jnp.max(info.kkt_residual),
        iterations=jnp.max(info.iterations),
        converged=jnp.all(info.converged),
    )
    return jnp.sum(weights, axis=0), worst
