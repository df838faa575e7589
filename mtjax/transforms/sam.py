"""Plain sharpness-aware minimisation of the sum of the losses."""

import optax

from mtjax.balancing.balancer import balancer
from mtjax.transforms.perturbation import (
    check_params,
    check_radius,
    moved,
    task_gradients_at,
    uphill,
)


def sam(
    *, rho: float = 0.05, adaptive: bool = False, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the tasks' gradients where the sum of the losses is largest nearby.

    All tasks have one perturbation in common, :math:`\epsilon = \rho\, g / \|g\|` with
    the gradient :math:`g` of the summed losses (with `adaptive`
    :math:`\rho\, \theta^2 \odot g / \| |\theta| \odot g \|`), over all parameters. The
    tasks' gradients :math:`\nabla L_i(\theta + \epsilon)` go on to the balancer behind
    it: `optax.chain(sam(), mtjax.cagrad(), optax.adam(1e-3))`. In front of
    `mtjax.equal` it is sharpness-aware minimisation of the sum.

    Args:
      rho: :math:`\rho`, at least 0.
      adaptive: whether the perturbation is relative to the size of each parameter;
        `rho` is then larger, 0.5 to 2.
      axis_name: inside `shard_map` or `pmap`, the axis over which the batch is split,
        as in `mtjax.value_and_task_grads`.

    Returns:
      A transform from task gradients to task gradients that needs `losses_fn` and
      `params`. It costs one more evaluation of the losses with its backward pass.
      Batch statistics and dropout: see `task_sam`.

    Raises:
      ValueError: if `rho` is negative, or a needed argument is not passed to the
        update.

    Example:
      >>> import jax.numpy as jnp, mtjax
      >>> def losses_fn(params):
      ...     return {"a": 0.5 * params @ params, "b": 2.0 * params @ params}
      >>> params = jnp.array([3.0, 4.0])
      >>> tx = optax.chain(sam(rho=0.5), mtjax.equal())
      >>> losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
      >>> updates, _ = tx.update(
      ...     grads, tx.init(params), params, losses_fn=losses_fn
      ... )
      >>> with jnp.printoptions(precision=3):
      ...     print(updates)
      [16.5 22. ]

    References:
      Sharpness-Aware Minimization for Efficiently Improving Generalization, 2021,
      equation 2; ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks, 2021, for `adaptive`, element-wise and without
      its small constant.
    """
    check_radius("rho", rho)

    def update(grads, state, step):
        check_params("sam", step.params)
        steps = uphill(
            grads.combine(),
            step.params,
            grads.shared,
            rho_shared=rho,
            rho_own=rho,
            adaptive=adaptive,
            joint_norm=True,
        )
        point = moved(step.params, steps)
        return task_gradients_at(point, step.losses_fn, grads, axis_name), state

    return balancer(
        "sam", lambda params: optax.EmptyState(), update, needs=("losses_fn",)
    )
