"""The weights that another balancer would give the tasks."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtjax.balancing.balancer import Step
from mtjax.gradients import TaskGradients


def weights_of(
    inner: optax.GradientTransformationExtraArgs,
    grads: TaskGradients,
    state: Any,
    step: Step,
) -> tuple[Float[Array, " tasks"], Any]:
    """Runs a balancer on gradients with the true Gramian, but weights for an update.

    Args:
      inner: a balancer that asks for the Gramian and for one weighted sum at most.
      grads: the gradients; the Gramian is computed only if `inner` asks for it.
      state: the state of `inner`.
      step: what is known about the step.

    Returns:
      One weight per task, zero for absent tasks, and the new state of `inner`.

    Raises:
      TypeError: if `inner` asks for the gradients themselves.
    """
    # Of a Jacobian that is the identity, the weighted sum is the weights.
    jacobian = jnp.eye(len(grads.tasks))
    split = TaskGradients.from_stacked(jacobian, grads.tasks).split
    stand_in: Any = TaskGradients(split, _WeightsOnly(grads))
    # Params-shaped for the inner balancer, whose parameters the weights stand for.
    result: Any = inner.update(
        stand_in,
        state,
        step.params,
        losses=step.losses,
        present=step.present,
        key=step.key,
    )
    return result


class _WeightsOnly:
    """Engine that returns the weights that it is given."""

    name = "weights"

    def __init__(self, grads: TaskGradients):
        self._grads = grads

    def pull(self, weights):
        return weights

    def gramian(self):
        return self._grads.gramian()

    def stack(self):
        return self._refuse()

    def inner(self, direction):
        return self._refuse()

    def _refuse(self) -> Any:
        raise TypeError(
            "The balancer inside `cr_mogm` or `scale_by_weighting` must make do with "
            "losses and the Gramian; one that works on the gradients themselves has no "
            "weights."
        )
