"""Weightings of the losses that look at nothing else and remember nothing."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float

from mtjax.balancing.balancer import balancer, check_preference

Weigh = Callable[
    [Float[Array, " tasks"], Bool[Array, " tasks"]], Float[Array, " tasks"]
]
Scalarise = Callable[[Float[Array, " tasks"], Bool[Array, " tasks"]], Float[Array, ""]]


def loss_weighting(
    name: str, weigh: Weigh, *, eps: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes a stateless balancer of a rule from the losses to weights.

    Args:
      name: the factory's name, for error messages.
      weigh: `weigh(losses, present) -> weights`; the losses of absent tasks are one.
      eps: losses below it count as it, where the rule needs positive losses.

    Returns:
      The transform, of the cost of one backward pass: each task's gradient times its
      weight, on shared and on task-specific parameters alike. Needs `losses`.

    Raises:
      ValueError: if `eps` is not positive, or `losses` are not passed to the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = loss_weighting("inverse", lambda losses, present: 1 / losses)
      >>> print(tx.update(jnp.eye(2), tx.init(None), losses=jnp.array([2.0, 4.0]))[0])
      [0.5  0.25]
    """
    check_eps(eps)

    def update(grads, state, step):
        losses = usable_losses(step.losses, step.present, eps)
        return grads.scale(weigh(losses, step.present)).combine(), state

    return balancer(name, lambda params: optax.EmptyState(), update, needs=("losses",))


def scalarisation(
    name: str, function: Scalarise, *, eps: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes a stateless balancer that minimises one function of all losses.

    By the chain rule the gradient of the function is the sum of the tasks' gradients,
    weighted by the function's derivatives with respect to the losses.

    Args:
      name: the factory's name, for error messages.
      function: `function(losses, present) -> scalar`, which does not depend on the
        losses of absent tasks.
      eps: losses below it count as it, also in the derivatives, so that none is zero or
        infinite there.

    Returns:
      The transform, of the cost of one backward pass. Needs `losses`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scalarisation("squares", lambda losses, present: 0.5 * losses @ losses)
      >>> print(tx.update(jnp.eye(2), tx.init(None), losses=jnp.array([2.0, 4.0]))[0])
      [2. 4.]
    """
    return loss_weighting(name, jax.grad(function), eps=eps)


def usable_losses(
    losses: Float[Array, " tasks"],
    present: Bool[Array, " tasks"],
    eps: float | None = None,
) -> Float[Array, " tasks"]:
    """Losses with ones for absent tasks, and `eps` for those below it."""
    # Before the derivative is taken, so that no NaN of an absent task gets into it.
    losses = jnp.where(present, losses, 1.0)
    return losses if eps is None else jnp.maximum(losses, eps)


def preferred(
    preference: ArrayLike | Sequence[float | int] | None, present: Bool[Array, " tasks"]
) -> Float[Array, " tasks"]:
    """What the user prefers, equal if none is given; zero for absent tasks."""
    if preference is None:
        return present.astype(jnp.float32)
    return jnp.where(present, check_preference(preference, len(present)), 0.0)


def safe_norm(vector: Float[Array, " tasks"]) -> Float[Array, ""]:
    """Euclidean length, whose gradient at zero is zero."""
    square = jnp.sum(vector**2)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def check_eps(eps: float | None) -> None:
    """Raises ValueError unless the bound of the losses is positive, or none."""
    if eps is not None and eps <= 0:
        raise ValueError(f"`eps` must be positive, got {eps}.")
