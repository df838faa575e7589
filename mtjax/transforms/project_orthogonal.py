"""Keeps updates out of given subspaces."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


def project_orthogonal(
    bases: PyTree, *, axis: int = -1
) -> optax.GradientTransformation:
    r"""Removes from every update its component in a subspace.

    $$u \leftarrow (I - B B^\top) \, u$$

    along one axis of every parameter. In front of an optimizer that rescales elements,
    such as Adam, it keeps the gradient out of the subspace but not the step; behind it,
    the step.

    Args:
      bases: a tree like the parameters; leaves are matrices with orthonormal columns,
        `(size of the axis, rank)`, or `None` where updates stay as they are.
      axis: of the parameters; -1: outputs of Flax's kernels, 0: of PyTorch's.

    Returns:
      A transform without state.

    Raises:
      ValueError: if a base is no matrix of at most as many columns as rows, or at the
        first update, if its rows do not fit the axis.

    Example:
      >>> tx = optax.chain(project_orthogonal({"w": jnp.eye(3)[:, :1]}), optax.sgd(1.0))
      >>> params = {"w": jnp.zeros((2, 3))}
      >>> updates, _ = tx.update({"w": jnp.ones((2, 3))}, tx.init(params))
      >>> print(updates["w"])
      [[-0. -1. -1.]
       [-0. -1. -1.]]

    References:
      Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient
      Descent", ICML, 2025, which keeps what all tasks share with it.
    """
    for path, base in jax.tree_util.tree_leaves_with_path(bases):
        if base.ndim != 2 or base.shape[0] < base.shape[1]:
            raise ValueError(
                "`bases` must be matrices of at most as many columns as rows, got "
                f"shape {base.shape} at {jax.tree_util.keystr(path)}."
            )

    def project(base, update):
        if base is None:
            return update
        if not update.ndim or update.shape[axis] != base.shape[0]:
            raise ValueError(
                f"`bases` must have as many rows as the update's axis {axis}, got "
                f"{base.shape} for an update of shape {update.shape}."
            )
        rows = jnp.moveaxis(update, axis, -1)
        inside = jnp.matmul(
            jnp.matmul(rows, base, precision="highest"), base.T, precision="highest"
        )
        return jnp.moveaxis(rows - inside.astype(rows.dtype), -1, axis)

    def update(updates, state, params=None):
        del params
        return jax.tree.map(project, bases, updates, is_leaf=lambda x: x is None), state

    return optax.GradientTransformation(optax.init_empty_state, update)
