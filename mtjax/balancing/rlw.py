"""Random loss weighting."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer, check_choice, default_key


class RLWState(NamedTuple):
    """State of `rlw`.

    Attributes:
      key: `()` random key of the next step.
    """

    key: Array


def rlw(
    *,
    distribution: Literal["normal", "dirichlet"] = "normal",
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs tasks at random, anew in every step.

    :math:`w = \mathrm{softmax}(\xi)` with standard normal :math:`\xi`, or
    :math:`w \sim \mathrm{Dirichlet}(1, \dots, 1)`, which is uniform on the simplex. The
    weights sum to one, in expectation they are equal; they apply to shared and to
    task-specific parameters alike.

    Args:
      distribution: "normal" or "dirichlet".
      key: random key, `jax.random.key(0)` if not given. A `key` that is passed to the
        update takes its place in that step.

    Returns:
      A balancer, with the key as its state, of the cost of one backward pass.

    Raises:
      ValueError: if `distribution` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = rlw()
      >>> weights, _ = tx.update(jnp.eye(3), tx.init(None))
      >>> print(weights.sum().round(3))
      1.0

    References:
      Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
      Learning, 2022, section 3.
    """
    check_choice("distribution", distribution, ("normal", "dirichlet"))
    start = default_key(key)

    def init(params):
        del params
        return RLWState(jnp.copy(start))

    def draw(key):
        if distribution == "normal":
            return jax.random.normal(key)
        # A softmax of logarithms of exponential variables is uniform on the simplex.
        return jnp.log(jax.random.exponential(key))

    def update(grads, state, step):
        next_key, step_key = jax.random.split(state.key)
        if step.key is not None:
            step_key = step.key
        # A key per task: what one draws depends on no other.
        each = lambda i: draw(jax.random.fold_in(step_key, i))
        logits = jax.vmap(each)(jnp.arange(len(grads.tasks)))
        weights = jax.nn.softmax(logits, where=step.present)
        return grads.scale(weights).combine(), RLWState(next_key)

    return balancer("rlw", init, update)
