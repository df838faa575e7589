"""DualProj: projecting the mean gradient onto the dual cone."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import check_preference, gramian_balancer
from mtjax.balancing.solvers import Info, bounded_qp, in_units


def dualproj(
    *, preference: Sequence[float] | None = None, reg_eps: float = 1e-4
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the direction closest to the mean gradient that hurts no task.

    :math:`d = \arg\min_d \|d - g_0\|` subject to :math:`\langle d, g_t \rangle \ge 0`
    for all tasks, where :math:`g_0` is the mean gradient. If it conflicts with no task
    that is the direction. Long gradients prevail, unlike in `upgrad`.

    Args:
      preference: weight of each task in :math:`g_0`, not negative; one over the number
        of present tasks if not given.
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
      >>> tx = dualproj(reg_eps=1e-7)
      >>> grads = jnp.array([[3.0, 0.0], [-1.0, 1.0]])
      >>> with jnp.printoptions(precision=3):
      ...     print(tx.update(grads, tx.init(None))[0])
      [0.75 0.75]

    References:
      Gradient Episodic Memory for Continual Learning, 2017, equation 11, of which the
      dual problem is solved; there the projected gradient is the new task's alone
      (`preference=[0, 0, 1]`). The regularisation is that of `upgrad`.
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
        return project_on_dual_cone(gramian, wanted, reg_eps)[0]

    return gramian_balancer("dualproj", weigh)


def project_on_dual_cone(
    gramian: Float[Array, "tasks tasks"],
    wanted: Float[Array, " tasks"],
    reg_eps: float,
) -> tuple[Float[Array, " tasks"], Info]:
    """Weights of the projection of a sum of gradients onto the dual cone.

    Args:
      gramian: inner products of the tasks' gradients.
      wanted: weights of the sum, not negative.
      reg_eps: relative regularisation, see `dualproj`.

    Returns:
      The weights, at least `wanted`, and how well they solve the problem.
    """
    ridge = reg_eps * jnp.trace(gramian)
    matrix, units, active = in_units(gramian, ridge)
    # In units a weight is multiplied by the unit; a ridge on all is one on each.
    weights, info = bounded_qp(
        matrix,
        jnp.zeros_like(units),
        wanted * units,
        active,
        ridge=jnp.where(active, ridge / units / units, 0.0),
    )
    return weights / units, info
