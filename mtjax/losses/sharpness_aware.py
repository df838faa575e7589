"""Any loss, taken where it is largest nearby."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

LossFn = Callable[..., tuple[Any, Any]]
"""`loss_fn(variables, *args)` to the loss and a tree of reports."""


def sharpness_aware(loss_fn: LossFn, rho: float = 0.05) -> LossFn:
    r"""Turns a loss into one whose gradient is that at the worst point nearby.

    .. math:: L(x + \rho \, g / \|g\|), \quad g = \nabla L(x), \text{ held fixed}

    For variables that one loss trains, such as merging coefficients; where several
    tasks train a model see `mtjax.sam`. It costs a second gradient.

    Args:
      loss_fn: from variables, and whatever else, to the loss and a tree of reports.
      rho: :math:`\rho \ge 0`, in the units of the variables.

    Returns:
      A function of the same arguments. Loss and reports are those at the worst point.

    Raises:
      ValueError: if `rho` is negative.

    Example:
      >>> loss_fn = sharpness_aware(lambda x: (x @ x, None), rho=0.5)
      >>> print(jax.grad(loss_fn, has_aux=True)(jnp.array([3.0, 4.0]))[0])
      [6.6 8.8]

    References:
      Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021,
      equation 2.
    """
    if rho < 0:
        raise ValueError(f"`rho` must not be negative, got {rho!r}.")

    def at_the_worst_point(variables: PyTree, *args):
        slopes, _ = jax.grad(loss_fn, has_aux=True)(variables, *args)
        slopes = jax.lax.stop_gradient(slopes)
        norm = optax.tree.norm(slopes)
        # At a minimum there is no direction to go.
        step = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
        moved = jax.tree.map(
            lambda x, g: x + (step * g).astype(x.dtype), variables, slopes
        )
        return loss_fn(moved, *args)

    return at_the_worst_point
